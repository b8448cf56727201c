"""A metric is one new file with one hook, and sees each point of a run in its order."""

from pathlib import Path

import pytest
import torch
from small_run import BATCH, SmallRun

import train.hooks as hooks
from openlm_pipeline.checkpoints.folders import list_checkpoints
from openlm_pipeline.checkpoints.reading import SafeReader
from train.hooks import HOOKS

METRIC = '''
import torch
from train.hooks import HOOKS, Hook

POINTS = []

@HOOKS.register("largest_gradient")
class LargestGradient(Hook):
    """Largest gradient of the steps since the last record, and in all."""

    def __init__(self, trainer):
        super().__init__(trainer)
        self.largest, self.ever = torch.zeros(()), torch.zeros(1)

    def accepts(self, step):
        parts = [p.grad.to_local().abs().max() for p in self.trainer.model.parameters()]
        self.largest = torch.stack([self.largest, *parts]).max()
        torch.maximum(self.ever, self.largest, out=self.ever)
        POINTS.append("accepts")
        return True

    def record(self):
        value, self.largest = self.largest.item(), torch.zeros(())
        return {"largest_gradient": value, "largest_gradient_ever": self.ever.item()}

    def state(self):
        return {"largest_gradient": {"ever": self.ever}}

    def before_step(self): POINTS.append("before")
    def after_step(self, step, taken): POINTS.append("after")
    def at_record(self, record): POINTS.append("record" if "loss" in record else "validation record")
    def between_steps(self): POINTS.append("between")
    def at_checkpoint(self, checkpoint): POINTS.append(f"saved {checkpoint.step}")
    def at_milestone(self):
        POINTS.append("milestone")
        return {"largest_gradient_at_milestone": self.ever.item()}
    def at_start(self, until): POINTS.append(f"start {until}")
    def at_end(self): POINTS.append("end")
    def at_outcome(self): POINTS.append("outcome")
    def close(self): POINTS.append("close")
'''


@pytest.fixture
def metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    known = HOOKS.names
    folder = tmp_path / "more_hooks"
    folder.mkdir()
    (folder / "largest_gradient_of_a_test.py").write_text(METRIC)
    monkeypatch.setattr(hooks, "__path__", [*hooks.__path__, str(folder)])
    assert set(HOOKS.names) - set(known) == {"largest_gradient"}
    yield __import__("train.hooks.largest_gradient_of_a_test", fromlist=["POINTS"])
    del HOOKS._entries["largest_gradient"]
    HOOKS._seen.discard("train.hooks.largest_gradient_of_a_test")
    monkeypatch.delitem(__import__("sys").modules, "train.hooks.largest_gradient_of_a_test")


def test_a_metric_is_one_new_file_and_changes_no_weights(metric, small: SmallRun, tmp_path: Path):
    small.train("milestones=[512]")
    assert [
        "start 512", *["before", "accepts", "after", "record", "between"] * 2, "milestone", "validation record",
        "saved 2", "end", "outcome", "close",
    ] == metric.POINTS  # fmt: skip
    small.train("milestones=[512,1024]")
    records = [r for r in small.run.read_metrics() if "loss" in r]
    assert all(0 < r["largest_gradient"] <= r["grad_norm"] for r in records)
    so_far = [max(r["largest_gradient"] for r in records[: i + 1]) for i in range(4)]
    assert [r["largest_gradient_ever"] for r in records] == so_far  # also after the resume
    checkpoint = list_checkpoints(small.run.checkpoints, small.run.fingerprint, pytest.fail)[-1]
    assert checkpoint.metrics["largest_gradient_at_milestone"] == so_far[-1]
    assert "largest_gradient.ever" in SafeReader(checkpoint.path).read_metadata().state_dict_metadata
    HOOKS._entries.pop("largest_gradient")
    plain = SmallRun(tmp_path / "plain", (2, 4))
    plain.train()
    HOOKS._entries["largest_gradient"] = metric.LargestGradient
    assert plain.losses() == small.losses()


def test_what_a_checkpoint_holds_is_named_as_before(small: SmallRun):
    small.train("training.averages=[ema_0.9]", "training.max_skipped_steps=1", f"milestones=[{BATCH}]")
    checkpoint = list_checkpoints(small.run.checkpoints, small.run.fingerprint, pytest.fail)[-1]
    names = SafeReader(checkpoint.path).read_metadata().state_dict_metadata
    parts = {n.partition(".")[0] if not n.startswith("ema_") else "ema_0.9" for n in names}
    assert parts == {"model", "optimizer", "ema_0.9", "stability"} and "stability.state" in names
    assert torch.float64 == names["stability.state"].properties.dtype
