"""The examples of docs/extending.md, each used for real after one new file and nothing else."""

import importlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_run import BATCH, RECIPE, SmallRun
from tokenizers import Tokenizer, models, pre_tokenizers
from typer.testing import CliRunner

from openlm_pipeline import registry
from openlm_pipeline.errors import ConfigError
from openlm_pipeline.registry import Registry
from openlm_pipeline.runs import programs
from train.hooks import HOOKS

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"
EXAMPLES = dict(re.findall(r"```python\n# (\S+\.py)\n(.*?)```", DOCUMENT.read_text(), re.DOTALL))
REGISTRIES = {r.package: r for r in (*vars(registry).values(), HOOKS) if isinstance(r, Registry)}


def package_of(path: str) -> str:
    return path.rpartition("/")[0].replace("/", ".")


@pytest.fixture
def add(tmp_path: Path) -> Iterator[Callable[..., Registry]]:
    """Put a file into a package for the length of a test; gives the registry of the package."""
    undo: list[Callable[[], Any]] = []

    def put(path: str, text: str | None = None) -> Registry:
        name, file, folder = package_of(path), Path(path).name, tmp_path / "added" / Path(path).parent
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(EXAMPLES[path] if text is None else text)
        places, filled = importlib.import_module(name).__path__, REGISTRIES[name]
        assert filled.names
        module = f"{name}.{file.removesuffix('.py')}"
        if str(folder) not in places:
            places.append(str(folder))
            undo.append(lambda: places.remove(str(folder)))
        importlib.invalidate_caches()

        def forget() -> None:
            for key in [key for key, entry in filled._entries.items() if entry.__module__ == module]:
                del filled._entries[key]
            filled._seen.discard(module)
            sys.modules.pop(module, None)

        undo.append(forget)
        return filled

    yield put
    for step in reversed(undo):
        step()


def test_every_registry_has_an_example():
    assert {package_of(path) for path in EXAMPLES} == set(REGISTRIES)


@pytest.mark.parametrize("path", EXAMPLES)
def test_a_forgotten_registration_and_an_unknown_name_are_errors(path: str, add):
    package = package_of(path)
    filled = REGISTRIES[package]
    name = filled.names[0]
    with pytest.raises(ConfigError, match=f"there is no {filled.kind} '{name}x'; did you mean '{name}'"):
        filled[f"{name}x"]
    assert all(inspect.getdoc(entry) for _, entry in filled)
    add(path, re.sub(r"^@\w+\.register\(.*\)\n", "", EXAMPLES[path], flags=re.MULTILINE))
    with pytest.raises(ConfigError, match=f"no name is registered for the {filled.kind} {package}"):
        filled["something"]


def test_launcher(add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from openlm_pipeline.cli.main import app

    add("openlm_pipeline/runs/launchers/ssh.py")
    small = SmallRun(tmp_path, (2,))
    (tmp_path / "recipes").mkdir()
    text = RECIPE.format(batch=BATCH, milestones=[2 * BATCH]) + "launcher: {kind: ssh, ssh: {host: gpu1}}\n"
    (tmp_path / "recipes" / "small.yaml").write_text(text)
    monkeypatch.setenv("OPENLM_HOME", str(small.home.root))
    monkeypatch.setenv("OPENLM_RECIPES", str(tmp_path / "recipes"))
    done = CliRunner().invoke(app, ["launch", "small", "--dry-run"], catch_exceptions=False)
    assert done.stdout.startswith("ssh -tt gpu1 'OPENLM_HOME=")
    assert " -m openlm_pipeline.runs.programs train " in done.stdout  # no path of this machine's installation
    assert programs.__file__ not in done.stdout
    with pytest.raises(ConfigError, match=r"launcher.ssh: unknown key 'hots'; did you mean 'host'\?"):
        small.experiment("launcher={kind: ssh, ssh: {hots: gpu1}}")
    with pytest.raises(ConfigError, match="kind 'ssh' needs 'ssh: {host: ...}'"):
        small.experiment("launcher.kind=ssh")


def test_raw_format(add, tmp_path: Path):
    from openlm_pipeline.corpus.formats import format_of
    from openlm_pipeline.corpus.reader import RecordReader

    (tmp_path / "a.txt").write_bytes(b"one\n\ntwo\n\xff\nthree")
    with pytest.raises(ConfigError, match="no suffix that can be read"):
        RecordReader(str(tmp_path / "a.txt"), on_bad=print)
    add("openlm_pipeline/corpus/formats/text_lines.py")
    bad = []
    reader = RecordReader(str(tmp_path / "a.txt"), on_bad=bad.append, max_bad_fraction=1)
    assert [(r.number, r.text, r.offset) for r in reader] == [(0, "one", 0), (1, "two", 5), (3, "three", 11)]
    assert [(b.line, b.offset) for b in bad] == [(4, 9)]
    assert len(format_of(str(tmp_path / "a.txt")).cut(1 << 20, 4)) == 4


def test_sampling(add, tmp_path: Path):
    from openlm_pipeline.ordering import make_order
    from openlm_pipeline.runs.identity import settings_identity

    small = SmallRun(tmp_path, (2,))
    before = settings_identity(small.experiment())
    add("openlm_pipeline/ordering/samplings/in_order.py")
    source, sample = make_order("in_order", [np.array([2, 1])], [1], 0).picks(0, 5)
    assert (source.tolist(), sample.tolist()) == ([0] * 5, [0, 1, 2, 0, 1])
    index, places = make_order("in_order", [np.array([2, 1])], [1], 0).occurrences(0, np.array([1, 2]), 2, 9)
    assert (index.tolist(), places.tolist()) == ([1, 0, 1, 0, 1], [2, 4, 5, 7, 8])
    assert settings_identity(small.experiment()) == before
    own = settings_identity(small.experiment("training.sampling=in_order"))["training"]
    assert own == before["training"] | {"sampling": "in_order"}


def test_tokenizer_engine(add, tmp_path: Path):
    from openlm_pipeline.tokenizers.engine import make_engine

    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    add("openlm_pipeline/tokenizers/engines/remembering.py")
    engine, line = make_engine(tmp_path / "tokenizer.json", "remembering", verify_every=1)
    assert [ids.tolist() for ids in engine.encode_batch(["ab", "ba", "ab"]).split()] == [[2], [1, 0], [2]]
    assert line.startswith("remembering tokenizers, 1 in 1 documents checked")


def test_task_type_and_rule(add, tmp_path: Path):
    from openlm_pipeline.evaluation.results import RequestScore, item_row
    from openlm_pipeline.evaluation.suite import load_suite
    from openlm_pipeline.evaluation.task_files import read_task_file
    from openlm_pipeline.evaluation.tasks import build_items
    from openlm_pipeline.storage.home import Home

    add("openlm_pipeline/evaluation/task_types/true_or_false.py")
    add("openlm_pipeline/evaluation/rules/sum.py")
    (tmp_path / "facts.jsonl").write_text(json.dumps({"statement": "Snow is white.", "is_true": True}) + "\n")
    task = {"label": "facts", "dataset_uri": "facts.jsonl", "num_fewshot": [0], "icl_task_type": "true_or_false"}
    suites = [{"icl_tasks": [task]}, {"icl_tasks": [{**task, "scored_by": "sum"}]}]
    for number, suite in enumerate(suites):
        (tmp_path / f"suite{number}.yaml").write_text(json.dumps(suite))
    by_mean, by_sum = (load_suite(tmp_path / f"suite{number}.yaml") for number in range(2))
    assert by_mean.digest != by_sum.digest
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    file = read_task_file(by_mean.icl_tasks[0], Home(tmp_path))
    (item,) = build_items(by_mean.icl_tasks[0], file, 0, tokenizer, 64)
    assert (item.gold, len(item.requests)) == (1, 2)
    scores = [RequestScore(-2.0, 1, False), RequestScore(-3.0, 3, False)]  # the second is likelier only on average
    assert item_row(by_mean.icl_tasks[0], 0, item, scores)["correct"]
    assert not item_row(by_sum.icl_tasks[0], 0, item, scores)["correct"]
    (tmp_path / "suite0.yaml").write_text(json.dumps({"icl_tasks": [{**task, "scored_by": "smu"}]}))
    with pytest.raises(ConfigError, match="there is no rule 'smu'; did you mean 'sum'"):
        load_suite(tmp_path / "suite0.yaml")


def test_schedule(add, tmp_path: Path):
    schedules = add("openlm_pipeline/experiments/schedules/inverse_root.py")
    training = SmallRun(tmp_path, (2,)).experiment("training.schedule=inverse_root").training
    schedule = schedules["inverse_root"](training)
    rates = [schedule.rate(step) for step in range(20)]
    warmup = schedule.warmup_steps
    assert max(rates) == rates[warmup - 1] == training.lr
    assert rates[4 * warmup - 1] == pytest.approx(training.lr / 2)


def test_optimizer(add, tmp_path: Path):
    import torch

    optimizers = add("openlm_pipeline/experiments/optimizers/sgd.py")
    training = SmallRun(tmp_path, (2,)).experiment("training.optimizer=sgd", "training.weight_decay=0").training
    weight = torch.nn.Parameter(torch.ones(2, 2))
    (optimizer,) = optimizers["sgd"](training).build([("layers.0.weight", weight)])
    weight.sum().backward()
    optimizer.step()
    assert torch.allclose(weight, torch.full((2, 2), 1 - training.lr))


def test_hook(add, tmp_path: Path):
    add("train/hooks/largest_gradient.py")
    small = SmallRun(tmp_path, (4,))
    small.train("execution.log_every=2")
    records = [r for r in small.run.read_metrics() if "loss" in r]
    assert len(records) == 2 and all(r["largest_grad_norm"] > r["grad_norm"] for r in records)  # the latter is a mean
