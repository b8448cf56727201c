"""The training run, top to bottom."""

import math
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from openlm_pipeline.errors import TrainingError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.layout import Home
from openlm_pipeline.lineage.fingerprint import short
from openlm_pipeline.lineage.run_identity import run_identity
from openlm_pipeline.runs.checkpoints import Checkpoint, list_checkpoints, newest_intact, promote, rotate
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.units import format_tokens
from train import checkpoint as checkpoints
from train.data import Batches
from train.distributed import World, build_model, start
from train.metrics import Metrics
from train.schedule import learning_rate
from train.signals import StopRequest
from train.validation import validation_loss


@dataclass(frozen=True)
class Outcome:
    """How a training process ended."""

    status: str
    """`completed` or `preempted`."""
    step: int
    tokens: int


class Trainer:
    """One training process of a run."""

    def __init__(self, experiment: Experiment, home: Home, world: World, datasets: list[ShardedDataset]) -> None:
        self.experiment, self.world = experiment, world
        self.run = RunFolder(home.run(experiment.name, experiment.version))
        held_out = experiment.validation_dataset()
        self.held_out = open_dataset(held_out, home) if held_out else None
        self.stop = StopRequest()
        self.console = Console(quiet=world.rank != 0, highlight=False, width=200, soft_wrap=True)
        self.batches = Batches(experiment, datasets, world.rank, world.size)
        self.model = build_model(experiment, world)
        self.optimizer = checkpoints.make_optimizer(experiment, self.model)
        self.metrics = Metrics(world)
        self.step = 0
        self.console.print(
            f"{experiment.name}: {sum(p.numel() for p in self.model.parameters()):,} parameters on {world.size} x "
            f"{world.device.type}, {self.batches.global_sequences} sequences of {experiment.seq_len} tokens a step"
        )

    @property
    def tokens(self) -> int:
        return self.step * self.experiment.training.global_batch

    def train(self, until: int) -> Outcome:
        """Make every milestone up to `until` tokens that is not there, each from the newest checkpoint before it."""
        milestones = {
            label: self.experiment.steps(tokens)
            for label, tokens in self.experiment.labelled_milestones()
            if tokens <= until
        }
        while True:
            there = {c.milestone: c.step for c in self.world.from_rank0(self._list)}
            label = next((m for m, step in milestones.items() if there.get(m) != step), None)
            if label is None:
                step = max([self.step, *milestones.values()])
                return Outcome("completed", step, step * self.experiment.training.global_batch)
            if not self._go_to_start(milestones[label]):
                continue  # what was taken for a milestone was damaged: there is an earlier one to make
            if not self._train_to(milestones[label]):
                self._save(milestone=None)
                return Outcome("preempted", self.step, self.tokens)
            self._reach_milestone(label)

    def _list(self) -> list[Checkpoint]:
        return list_checkpoints(self.run.checkpoints, self.run.fingerprint, self._warn)

    def _warn(self, message: str) -> None:
        self.console.print(f"warning: {message}")

    def _go_to_start(self, target: int) -> bool:
        """Load the newest intact checkpoint up to `target`, unless the weights in memory are at least as far.

        False, with nothing loaded, where a milestone turned out to be damaged and was set aside.
        """

        def choose() -> tuple[Checkpoint | None, bool]:
            before = self._list()
            newest = newest_intact(before, target, self._warn)
            return newest, any(c.milestone and not c.path.exists() for c in before)

        newest, milestone_lost = self.world.from_rank0(choose)
        if milestone_lost:
            return False
        here = self.step if self.step <= target else -1
        if newest is not None and newest.step > here:
            checkpoints.load(newest, self.model, self.optimizer)
            self.step = newest.step
            self.console.print(f"resumed from {newest.path.name} ({format_tokens(newest.tokens)} tokens)")
        elif here < 0:
            raise TrainingError(f"no intact checkpoint to go back to step {target} from; start the run again")
        self.metrics.reset()
        return True

    def _train_to(self, target: int) -> bool:
        """Step until `target`; False if a signal asked to stop before."""
        every = self.experiment.execution.checkpoint_every
        save_every = self.experiment.steps(every) if every else None
        batches = self.batches.from_step(self.step)
        logged_at = self.step
        while self.step < target:
            waiting = time.perf_counter()
            batch = next(batches)
            self.metrics.data_wait_seconds += time.perf_counter() - waiting
            lr = self._optimizer_step(batch.to(self.world.device, non_blocking=True))
            self.step += 1
            if self.step % self.experiment.execution.log_every == 0 or self.step == target:
                self._log(lr, self.step - logged_at)
                logged_at = self.step
            if self.world.any(self.stop.requested):
                return False
            if save_every and self.step % save_every == 0 and self.step < target:
                self._save(milestone=None)
        return True

    def _optimizer_step(self, batch: torch.Tensor) -> float:
        """One step on this rank's samples [local_sequences, seq_len + 1]; returns the learning rate used."""
        training = self.experiment.training
        lr = learning_rate(training, self.experiment.schedule_horizon(), self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = torch.zeros((), device=self.world.device)
        micro_batches = batch.split(self.batches.micro_batch)
        for i, micro in enumerate(micro_batches):
            self.model.set_requires_gradient_sync(i == len(micro_batches) - 1)
            ce_sum, z_sum = self.model(micro[:, :-1], micro[:, 1:])
            total = ce_sum + training.z_loss * z_sum if training.z_loss else ce_sum
            # FSDP averages gradients over ranks; times world size this is the mean over the global batch's tokens.
            (total * self.world.size / training.global_batch).backward()
            loss += ce_sum.detach() / training.global_batch
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.grad_clip or math.inf)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.metrics.add(loss, grad_norm)
        return lr

    def _log(self, lr: float, steps: int) -> None:
        """Append a record; stop all ranks where the loss is not finite, before anything is saved."""
        record = self.metrics.read(steps * self.experiment.training.global_batch, lr)
        if not math.isfinite(record["loss"]) or not math.isfinite(record["grad_norm"]):
            raise TrainingError(
                f"loss {record['loss']}, gradient norm {record['grad_norm']} at step {self.step}: not finite. The last "
                "checkpoint before it is kept; lower the learning rate, or look at the data of these steps"
            )
        if self.world.rank == 0:
            self.run.append_metrics({"step": self.step, "tokens": self.tokens, **record})
        self.console.print(
            f"step {self.step:>7}  {format_tokens(self.tokens):>9} tokens  loss {record['loss']:.4f}  lr {lr:.2e}  "
            f"grad norm {record['grad_norm']:.2f}  {record['tokens_per_second']:,.0f} tokens/s"
        )

    def _validate(self) -> dict[str, float]:
        if self.held_out is None:
            return {}
        limit = self.experiment.validation.max_samples
        loss = validation_loss(self.model, self.held_out, limit, self.batches.micro_batch, self.world)
        if not math.isfinite(loss):
            raise TrainingError(f"validation loss {loss} at step {self.step}: not finite; nothing was saved")
        if self.world.rank == 0:
            self.run.append_metrics({"step": self.step, "tokens": self.tokens, "validation_loss": loss})
        self.console.print(f"step {self.step:>7}  validation loss {loss:.4f}")
        return {"validation_loss": loss}

    def _reach_milestone(self, label: str) -> None:
        metrics = self._validate()
        here = [c for c in self.world.from_rank0(self._list) if c.step == self.step]
        if here:  # a rotating checkpoint stands exactly here, from before this was a milestone
            self.world.from_rank0(lambda: promote(here[0], label, metrics))
        else:
            self._save(milestone=label, metrics=metrics)

    def _save(self, milestone: str | None, metrics: dict[str, float] | None = None) -> None:
        if self.world.any(not self._weights_finite()):
            raise TrainingError(f"weights are not finite at step {self.step}; nothing was saved")
        made = checkpoints.save(
            self.run.checkpoints, self.model, self.optimizer, self.world,
            run_fingerprint=self.world.from_rank0(lambda: self.run.fingerprint),
            step=self.step, tokens=self.tokens, milestone=milestone, metrics=metrics or {},
        )  # fmt: skip
        keep = self.experiment.execution.keep_checkpoints
        self.world.from_rank0(lambda: rotate(self._list(), keep))
        self.console.print(f"saved {made.path.name}" + (f", milestone {milestone}" if milestone else ""))

    def _weights_finite(self) -> bool:
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters())
        return all(bool(torch.isfinite(p).all()) for p in local)


def run_training(experiment: Experiment, home: Home, until: int, *, supersede: bool = False) -> Outcome:
    """Train to `until` tokens in the process group of this process, and leave `outcome.json` behind.

    Raises:
        OpenLMError: what is wrong with the recipe, the data, the folder or the run.
    """
    world = start()
    run = RunFolder(home.run(experiment.name, experiment.version))
    datasets = [open_dataset(d, home) for d in experiment.training_datasets()]
    identity = run_identity(
        experiment, {d.name: opened.version for d, opened in zip(experiment.training_datasets(), datasets)}
    )

    def held() -> Outcome:
        world.from_rank0(lambda: run.claim(experiment, identity, supersede=supersede))
        world.from_rank0(run.clear_outcome)  # of an earlier process: until this one ends there is none
        trainer = Trainer(experiment, home, world, datasets)
        trainer.console.print(f"run {run.path} ({short(run.fingerprint)})")
        try:
            outcome = trainer.train(until)
        except BaseException as e:
            if world.rank == 0:
                run.write_outcome("failed", trainer.step, trainer.tokens, reason=str(e) or type(e).__name__)
            raise
        if world.rank == 0:
            run.write_outcome(outcome.status, outcome.step, outcome.tokens)
        return outcome

    if world.rank != 0:
        world.from_rank0(None)
        return held()
    return _hold_lock(run, world, held)


def _hold_lock(run: RunFolder, world: World, held) -> Outcome:
    """Rank 0 holds the run's lock for its lifetime; if it cannot, every rank hears of it."""
    lock = run.lock()
    world.from_rank0(lock.__enter__)
    try:
        return held()
    finally:
        lock.__exit__(None, None, None)
