"""Generated blocks of a Markdown file: filled between their markers, nothing else touched, drift found."""

import pytest

from openlm_pipeline.errors import ConfigError, MissingInputError
from openlm_pipeline.reports.markdown_blocks import block_names, check_blocks, update_blocks

TEXT = "# Title\n\n<!-- openlm:begin scores -->\nold\n<!-- openlm:end scores -->\n\nEnd, with ümlaut.\n"


@pytest.fixture
def readme(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_block_is_filled_and_the_rest_stays(readme):
    assert check_blocks(readme, {"scores": "| a |\n"}) == ["scores"]
    assert readme.read_text(encoding="utf-8") == TEXT
    assert update_blocks(readme, {"scores": "| a |\n"}) == ["scores"]
    assert readme.read_text(encoding="utf-8") == TEXT.replace("old", "| a |")
    assert check_blocks(readme, {"scores": "| a |\n"}) == []
    assert update_blocks(readme, {"scores": "| a |", "unused": "x"}) == []


def test_two_blocks_of_which_one_drifted(readme):
    readme.write_text(TEXT + TEXT.replace("scores", "more"))
    assert block_names(readme) == ["scores", "more"]
    assert update_blocks(readme, {"scores": "old", "more": "new\n\nlines"}) == ["more"]
    assert readme.read_text() == TEXT + TEXT.replace("scores", "more").replace("old", "new\n\nlines")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("<!-- openlm:begin other --><!-- openlm:end other -->", "'other'"),
        ("\n<!-- openlm:begin scores -->", "'scores' is not closed"),
        ("<!-- openlm:end scores -->", "line 1: block 'scores' ends and was not begun"),
        ("<!-- openlm:begin scores -->\n<!-- openlm:begin scores -->", "line 2"),
        ("<!-- openlm:begin scores --><!-- openlm:end other -->", "'other' ends"),
        (TEXT + TEXT, "there twice"),
        ("<!-- openlm:start scores -->", "openlm:start"),
    ],
)
def test_a_marker_that_makes_no_sense_is_refused_and_nothing_is_written(readme, text, named):
    readme.write_text(text)
    with pytest.raises(ConfigError, match=named):
        update_blocks(readme, {"scores": "x"})
    assert readme.read_text() == text


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MissingInputError):
        check_blocks(tmp_path / "none.md", {})
