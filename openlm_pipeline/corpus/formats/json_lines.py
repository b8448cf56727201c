"""JSON lines: one record per line, read in parts."""

from collections.abc import Iterator
from typing import BinaryIO

from openlm_pipeline.corpus.formats import Found, RawFormat, Reading
from openlm_pipeline.corpus.json_records import BadText, NotJson, text_of
from openlm_pipeline.corpus.line_content import LineContent, Raw, line_content, lines_of
from openlm_pipeline.errors import DataError
from openlm_pipeline.registry import RAW_FORMATS


@RAW_FORMATS.register("json lines")
class JsonLines(RawFormat):
    """One JSON object per line."""

    suffixes = (".jsonl", ".ndjson")
    seekable = True

    def records(self, file: BinaryIO, reading: Reading) -> Iterator[Found]:
        content = line_content(file, reading)
        if content is None:
            return
        for raw in self._pieces(content, reading):
            reading.lines += 1
            if raw.data is not None and not raw.data.strip():
                continue
            try:
                text = text_of(raw.data, reading.text_key)
            except BadText as e:
                if not raw.ended and isinstance(e, NotJson):
                    raise DataError(
                        f"raw file {reading.url} is truncated: it ends inside line {raw.line}, which begins at byte "
                        f"{raw.offset} of its content ({e}). Fetch it again."
                    ) from None
                yield Found(raw.line, raw.offset, None, str(e), raw.size)
            else:
                yield Found(raw.line, raw.offset, text)

    def _pieces(self, content: LineContent, reading: Reading) -> Iterator[Raw]:
        """What should be JSON records."""
        return lines_of(content.blocks, content.offset, content.past_end)
