"""`openlm study fit`: tables of others, what is wrong in them, and the page."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest
from commands import openlm

from openlm_pipeline.checkpoints.folders import promote
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.evaluation.scorecard import load_scorecard
from openlm_pipeline.experiments import load_experiment
from openlm_pipeline.models import count_parameters
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.storage.home import Home
from openlm_pipeline.studies.points import study_points
from openlm_pipeline.studies.published import read_published

COLUMNS = "name,parameters,tokens,loss,loss_error,error,seed,setting.lr"


def table(noise: float = 0.002) -> str:
    random, lines = np.random.default_rng(5), [COLUMNS]
    for n in (1e6, 4e6, 16e6, 64e6):
        for m in (5, 20, 80):
            for i, lr in enumerate((0.002, 0.004, 0.008) if m == 20 else (0.004,)):
                for seed in (0, 1) if n == 1e6 and m == 20 else (0,):
                    loss = 1.8 + 400 / n**0.35 + 1500 / (m * n) ** 0.35 + 0.1 * (i - 1) ** 2 * (m == 20)
                    loss *= np.exp(noise * random.standard_normal())
                    error = 0.85 - 2.2 * np.exp(-0.75 * loss)
                    lines.append(f"r{n:.0e}-{m}-{lr},{n / 1e6:g}M,{m * n:.0f},{loss:.5f},0.001,{error:.5f},{seed},{lr}")
    return "\n".join(lines) + "\n"


def fit(*arguments):
    return openlm("study", "fit", *arguments, variables={})


@pytest.fixture
def runs(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(table())
    return path


def test_a_table_is_fitted_and_the_hold_out_printed(runs):
    shown = fit("--from", runs, "--predict", "1B:20B", "--refits", "20")
    assert shown.returncode == 0, shown.stderr
    assert re.search(
        r"held out: loss of 64M on 320M tokens, from \d+ smaller runs [\d.]+ \(95% .*off by [+-]", shown.stdout
    )
    assert re.search(r"predicted loss of 1B on 20B tokens: 2\.\d+ \(95% 2\.", shown.stdout)
    assert re.search(r"noise: 0\.0\d+ nats between seeds \(2 runs\)", shown.stdout)


def test_the_page_shows_all_and_loads_nothing(runs, tmp_path):
    page = tmp_path / "page.html"
    shown = fit("--from", runs, "--predict", "1B:20B", "--refits", "20", "--json", "--html", page)
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout)
    text = page.read_text()
    assert "<script" not in text and "http" not in text and text.count("<svg") == 3
    for part in ("Loss against compute", "loss, held out", "loss, predicted", "Sweep of lr", "best lr =", "★"):
        assert part in text
    assert f"{found['prediction']['loss']['value']:.4f}" in text
    assert all(run["name"] in text for run in found["runs"])


@pytest.mark.parametrize(
    "old, new, what",
    [
        ("1M,5000000,", "1M,,", r"runs.csv:2: tokens is missing"),
        ("1M,5000000,", "1M,many,", r"runs.csv:2: tokens is 'many'"),
        ("1M,5000000,", "0,5000000,", r"runs.csv:2: parameters is 0"),
        ("setting.lr", "sede", r"unknown column 'sede'; did you mean 'seed'\?"),
        (",0.001,", ",small,", r"runs.csv:2: loss_error is 'small'"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(runs, old, new, what):
    runs.write_text(runs.read_text().replace(old, new, 1))
    shown = fit("--from", runs)
    assert shown.returncode == 4 and re.search(what, shown.stderr), shown.stderr


def test_what_is_no_table_is_refused(tmp_path):
    assert fit("--from", tmp_path / "none").returncode == 3
    (tmp_path / "runs.csv").write_bytes(b"parameters,tokens\n\xff\n")
    shown = fit("--from", tmp_path)
    assert shown.returncode == 4 and "runs.csv is not UTF-8" in shown.stderr


def test_json_lines_are_read_as_a_table(tmp_path):
    rows = [{"parameters": "10M", "tokens": 200_000_000, "loss": 4.5, "setting.lr": 0.003}]
    (tmp_path / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (point,) = read_published(tmp_path)
    assert (point.parameters, point.tokens_per_parameter, point.settings) == (10_000_000, 20, {"lr": 0.003})
    (tmp_path / "runs.jsonl").write_text('{"parameters": 1}\n{"parameters"')
    shown = fit("--from", tmp_path)
    assert shown.returncode == 4 and "runs.jsonl:2 is not valid JSON" in shown.stderr


def record(folder, **changes):
    (folder / "models").mkdir(exist_ok=True)
    result = {"loss": 4.0, "loss_sequences_lower_95": 3.99, "loss_sequences_upper_95": 4.01}
    result["val_data"] = ["eval_data/c4_val/shard-{0000000..0000010}.tar"]
    whole = {"dataset_name": "rpj", "hyperparameters": {"params": 10**7, "tokens": 2 * 10**8}, "results": [result]}
    (folder / "models" / "rpj-tiny-1.0.json").write_text(json.dumps(whole | changes))


def test_published_records_are_read_and_a_wrong_one_is_named(tmp_path):
    record(tmp_path)
    (point,) = read_published(tmp_path)
    assert (point.name, point.model, point.dataset, point.error) == ("rpj-tiny-1.0", "tiny", "rpj", None)
    assert point.loss_error == pytest.approx(0.01 / 1.96, rel=1e-4)
    for changes, what in (
        ({"results": [7, {"val_data": 7}]}, "rpj-tiny-1.0.json: results has 0 losses on c4_val"),
        ({"hyperparameters": {"params": "ten", "tokens": 1}}, "rpj-tiny-1.0.json: params is 'ten', not a number"),
    ):
        record(tmp_path, **changes)
        shown = fit("--from", tmp_path)
        assert shown.returncode == 4 and what in shown.stderr


@pytest.mark.parametrize(
    "arguments, what",
    [
        ((), "give a study or recipes, or --from"),
        (("--predict", "1.4B"), "write PARAMETERS:TOKENS"),
        (("--train", "parameters<5M", "--predict", "1B:20B"), "are left, and the law needs|it needs 5 or more"),
        (("--train", "params<5M"), "runs have no 'params'; did you mean 'parameters'"),
        (("--train", "tokens>9T"), "selects none of the"),
        (("--estimator", "gadre", "--law", "hoffmann"), "fits their law alone"),
        (("--dataset", "c4"), "there is no dataset 'c4'"),
    ],
)
def test_a_wrong_option_is_exit_code_2(runs, arguments, what):
    source = ("--from", runs) if arguments else ()
    shown = fit(*source, *arguments)
    assert shown.returncode == 2 and re.search(what, shown.stderr), shown.stderr


def test_the_commands_start_without_the_libraries_of_a_fit():
    program = "import sys, openlm_pipeline.cli.main, openlm_pipeline.studies.laws; sys.exit('scipy' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_own_runs_are_points_of_their_last_milestone(finished, tmp_path, monkeypatch):
    pipeline = finished.copy(tmp_path)
    for name, value in pipeline.variables.items():
        monkeypatch.setenv(name, value)
    home = Home.from_env()
    with pytest.raises(ConfigError, match="tiny has no held-out loss"):
        study_points("tiny", home, print)
    experiment = load_experiment("tiny", [])
    checkpoint = RunFolder(home.run("tiny", "v1")).saved()[-1]
    promote(checkpoint, checkpoint.milestone, checkpoint.metrics | {"validation_loss": 3.5})
    (point,) = study_points("tiny", home, print)
    assert (point.tokens, point.loss) == (checkpoint.tokens, 3.5)
    card = load_scorecard(home.scorecard("tiny", "v1", checkpoint.milestone) / "scorecard.json")
    assert point.error == pytest.approx(1 - card.average)
    assert point.parameters == count_parameters(experiment.model_config_resolved())
    assert point.settings["training.lr"] == experiment.training.lr
    shown = openlm("study", "fit", "tiny", variables=pipeline.variables)
    assert shown.returncode == 2 and "1 runs for a law of 4 unknowns" in shown.stderr
