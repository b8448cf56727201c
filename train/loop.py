"""The training run, top to bottom."""

import math
import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from openlm_pipeline.checkpoints.folders import Checkpoint, list_checkpoints, newest_intact, promote, rotate
from openlm_pipeline.errors import TrainingError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.experiments.choices import unread_settings
from openlm_pipeline.fingerprint import short
from openlm_pipeline.models.transformer import IGNORE_INDEX
from openlm_pipeline.registry import SCHEDULES
from openlm_pipeline.runs.dry_run import size_line
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.identity import run_identity
from openlm_pipeline.runs.parent import parent_checkpoint, parent_identity
from openlm_pipeline.runs.upload import Uploads
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import join
from openlm_pipeline.units import format_tokens
from train import saver as checkpoints
from train.averages import Averages
from train.beginning import begin_from, load_initial_weights, weights_identity
from train.data import Batches
from train.distributed import World, start
from train.masking import Masking, ModelInput
from train.metrics import Metrics, console_text
from train.optimizers import make_optimizer
from train.parallel import build_model, use_deterministic_algorithms
from train.profile import StepProfiler
from train.reporting import Reporter, check_report_to
from train.signals import StopRequest
from train.stability import Stability
from train.validation import validate
from train.watchdog import Watchdog, record_collectives


@dataclass(frozen=True)
class Outcome:
    """How a training process ended."""

    status: str
    """`completed` or `preempted`."""
    step: int
    tokens: int


class Trainer:
    """One training process of a run."""

    def __init__(
        self,
        experiment: Experiment,
        home: Home,
        world: World,
        datasets: list[ShardedDataset],
        uploads: Uploads | None = None,
        *,
        run: RunFolder | None = None,
        initial_weights: Mapping[Path, float] | None = None,
        start_tokens: int = 0,
    ) -> None:
        """
        Args:
            initial_weights: see `run_training`.
            start_tokens: of the parent's checkpoint, where the experiment is a fork.
        """
        self.experiment, self.home, self.world = experiment, home, world
        self.run = run or RunFolder(home.run(experiment.name, experiment.version))
        held_out = experiment.validation_dataset()
        self.held_out = open_dataset(held_out, home) if held_out else None
        self.stop = StopRequest()
        self.console = Console(quiet=world.rank != 0, highlight=False, width=200, soft_wrap=True)
        self.batches = Batches(experiment, datasets, world.rank, world.size)
        if experiment.execution.deterministic:
            use_deterministic_algorithms()
        opened = [*datasets, self.held_out] if self.held_out else datasets
        self.masking = Masking(experiment.training, {d.info["eot_id"] for d in opened})
        self.model = build_model(experiment, world)
        self.initial_weights = initial_weights
        self.optimizer = make_optimizer(experiment.training, self.model)
        self.averages = Averages(experiment.training.averages, self.model)
        self.stability = Stability(experiment.training, world)
        self.metrics = Metrics(world, experiment, self._warn)
        self.world.from_rank0(lambda: check_report_to(experiment))
        self.reporter = Reporter(experiment, self.run, self._warn) if world.rank == 0 else None
        self.profiler = StepProfiler(self.run.path / "profile", experiment.execution.profile_steps, world.rank)
        self.step = start_tokens // experiment.training.global_batch
        self.has_begun = False
        """Whether the weights in memory are the run's."""
        self.schedule_start, horizon = 0, experiment.schedule_horizon()
        if experiment.schedule_start():
            self.schedule_start = self.step
            horizon = horizon and horizon - start_tokens
        self.schedule = SCHEDULES[experiment.training.schedule](experiment.training, horizon)
        self.uploads = uploads
        self.saver = checkpoints.Saver(
            self.run.checkpoints, world.from_rank0(lambda: self.run.fingerprint), world,
            asynchronous=experiment.execution.async_save, on_saved=self._on_saved,
        )  # fmt: skip
        self.watchdog = Watchdog(experiment.execution.hang_seconds, self.run.path / "hangs", world.rank, self._on_hang)
        for sentence in unread_settings(experiment.training):
            self._warn(sentence)
        self.console.print(
            f"{experiment.name}: {size_line(self.model.config, experiment.seq_len)}; on {world.size} x "
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
            self.saver.wait()
            there = {c.milestone: c.step for c in self.world.from_rank0(self._list)}
            label = next((m for m, step in milestones.items() if there.get(m) != step), None)
            if label is None:
                step = max([self.step, *milestones.values()])
                return Outcome("completed", step, step * self.experiment.training.global_batch)
            if not self._go_to_start(milestones[label]):
                continue  # what was taken for a milestone was damaged: there is an earlier one to make
            if not self._train_to(milestones[label]):
                self._save(milestone=None)
                self.saver.wait()
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
            checkpoints.load(newest, self.model, self.optimizer, self._extra())
            self.step = newest.step
            self.console.print(f"resumed from {newest.path.name} ({format_tokens(newest.tokens)} tokens)")
        elif here < 0:
            raise TrainingError(f"no intact checkpoint to go back to step {target} from; start the run again")
        elif not self.has_begun:
            self._begin()
        self.has_begun = True
        self.metrics.reset()
        return True

    def _begin(self) -> None:
        """Take the weights that the run is to begin with, where they are not its own; averages begin at them."""
        experiment, world = self.experiment, self.world
        if self.initial_weights:
            load_initial_weights(self.model, experiment.model_config_resolved(), self.initial_weights, world)
            self.averages = Averages(experiment.training.averages, self.model)
        elif experiment.parent:
            parent = world.from_rank0(lambda: parent_checkpoint(experiment, self.home))
            self.averages = begin_from(parent, experiment, world, self.model, self.optimizer, self._extra())
            self.console.print(f"begins at {parent.path} ({format_tokens(parent.tokens)} tokens)")

    def _train_to(self, target: int) -> bool:
        """Step until `target`; False if a signal asked to stop before."""
        every = self.experiment.execution.checkpoint_every
        save_every = self.experiment.steps(every) if every else None
        every = self.experiment.validation.every if self.experiment.validation else None
        validate_every = self.experiment.steps(every) if every else None
        logged_at = self.step
        with closing(self.batches.from_step(self.step)) as batches:
            while self.step < target:
                self.profiler.at(self.step)
                self.watchdog.step()
                waiting = time.perf_counter()
                batch = next(batches)
                self.metrics.data_wait_seconds += time.perf_counter() - waiting
                lr = self._optimizer_step(batch.to(self.world.device, non_blocking=True))
                self.step += 1
                if self.stability.reason is not None:
                    self._report_skipped(self.stability.reason)
                due = self.step % self.experiment.execution.log_every == 0 or self.step == target
                if due and self.metrics.steps:
                    self._log(lr, self.step - logged_at)
                    logged_at = self.step
                must_stop = self.world.any(self.stop.requested or self.saver.failed)
                self.watchdog.pause()
                if validate_every and self.step % validate_every == 0 and self.step < target:
                    self._validate()
                if must_stop:
                    self.saver.wait()  # raises what went wrong in a save
                    return False
                if save_every and self.step % save_every == 0 and self.step < target:
                    self._save(milestone=None)
        return True

    def _report_skipped(self, reason: str) -> None:
        """Record that the last step was left out; stop all ranks if it is one too many in a row."""
        first, count = (self.step - 1) * self.batches.global_sequences, self.batches.global_sequences
        if self.world.rank == 0:
            samples = {"first_sample": first, "num_samples": count}
            self.run.append_metrics({"step": self.step, "tokens": self.tokens, "skipped": reason, **samples})
        self._warn(f"step {self.step} is left out, samples {first} to {first + count - 1} of the order: {reason}")
        if self.stability.must_stop:
            raise TrainingError(
                f"{self.stability.skipped_in_a_row} steps in a row were left out, the last one step {self.step} "
                f"({reason}); training.max_skipped_steps is {self.stability.max_skipped_steps}. The last checkpoint "
                "before them is kept; lower the learning rate, or look at the data of these steps"
            )

    def _optimizer_step(self, batch: torch.Tensor) -> float:
        """One step on this rank's samples [local_sequences, seq_len + 1]; returns the learning rate used."""
        training = self.experiment.training
        lr = self.schedule.rate(self.step - self.schedule_start)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs = [self.masking(samples) for samples in batch.split(self.batches.micro_batch)]
        num_targets = self._count_targets(inputs)
        loss = torch.zeros((), device=self.world.device)
        for i, x in enumerate(inputs):
            self.model.set_requires_gradient_sync(i == len(inputs) - 1)
            ce_sum, z_sum = self.model(x.ids_BS, x.targets_BS, documents_BS=x.documents_BS)
            total = ce_sum + training.z_loss * z_sum if training.z_loss else ce_sum
            # FSDP averages gradients over ranks; times world size this is the mean over the global batch's targets.
            (total * self.world.size / num_targets).backward()
            loss += ce_sum.detach() / num_targets
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.grad_clip or math.inf)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        if self.stability.accepts(loss, grad_norm):
            self.optimizer.step()
            self.averages.update(self.step + 1)
            self.metrics.add(loss, grad_norm)
        self.optimizer.zero_grad()
        return lr

    def _count_targets(self, inputs: list[ModelInput]) -> torch.Tensor | int:
        """Targets in the global batch; where some are masked a number on the device, which nobody waits for."""
        if not self.masking.masks_targets:
            return self.experiment.training.global_batch
        counts = torch.stack([(x.targets_BS != IGNORE_INDEX).sum() for x in inputs])
        return self.world.sum(counts.sum()).clamp(min=1)  # a batch without targets has loss 0, not 0/0

    def _log(self, lr: float, steps: int) -> None:
        """Append a record; stop all ranks where the loss is not finite, before anything is saved."""
        record = self.metrics.read(steps, lr)
        if not math.isfinite(record["loss"]) or not math.isfinite(record["grad_norm"]):
            raise TrainingError(
                f"loss {record['loss']}, gradient norm {record['grad_norm']} at step {self.step}: not finite. The last "
                "checkpoint before it is kept; lower the learning rate, or look at the data of these steps"
            )
        self._record(record)
        self.console.print(f"step {self.step:>7}  {format_tokens(self.tokens):>9} tokens  {console_text(record)}")

    def _record(self, record: dict[str, float | None]) -> None:
        """A record of this step, to `metrics.jsonl` and to what `execution.report_to` names."""
        if self.world.rank == 0:
            record = {"step": self.step, "tokens": self.tokens, **record}
            self.run.append_metrics(record)
            self.reporter.write(record)

    def _validate(self) -> dict[str, float]:
        """Loss on held-out text as a record, empty where there is none."""
        if self.held_out is None:
            return {}
        validation = self.experiment.validation
        with self.metrics.paused():
            result = validate(
                self.model, self.held_out, self.masking, self.world,
                max_samples=validation.max_samples, batch_size=self.batches.micro_batch, intervals=validation.intervals,
            )  # fmt: skip
        if not math.isfinite(result.loss):
            raise TrainingError(f"validation loss {result.loss} at step {self.step}: not finite; nothing was saved")
        self._record(result.record())
        interval = "" if result.interval is None else " ({:.4f} to {:.4f})".format(*result.interval)
        self.console.print(f"step {self.step:>7}  validation loss {result.loss:.4f}{interval}")
        return result.record()

    def close(self) -> None:
        """End what watches this process."""
        self.profiler.stop(self.step)
        if self.reporter:
            self.reporter.close()
        self.saver.close(self._warn)

    def _reach_milestone(self, label: str) -> None:
        self.saver.wait()
        metrics = self._validate()
        here = [c for c in self.world.from_rank0(self._list) if c.step == self.step]
        if here:  # a rotating checkpoint stands exactly here, from before this was a milestone
            self.world.from_rank0(lambda: self._keep(promote(here[0], label, metrics)))
        else:
            self._save(milestone=label, metrics=metrics)

    def _save(self, milestone: str | None, metrics: dict[str, float] | None = None) -> None:
        if self.world.any(not self._weights_finite()):
            raise TrainingError(f"weights are not finite at step {self.step}; nothing was saved")
        self.saver.save(
            self.model, self.optimizer, self._extra(),
            step=self.step, tokens=self.tokens, milestone=milestone, metrics=metrics or {},
        )  # fmt: skip
        if milestone:
            self.saver.wait()

    def _extra(self) -> checkpoints.Extra:
        """What a checkpoint holds beside model and optimizer."""
        stability = self.stability.state_dict()
        return {**self.averages.state, **({"stability": stability} if stability else {})}

    def _on_saved(self, saved: checkpoints.Saved) -> None:
        """On rank 0, in the thread that wrote the checkpoint."""
        made = saved.checkpoint
        self._keep(made)
        rotate(self._list(), self.experiment.execution.keep_checkpoints, self.uploads.steps if self.uploads else ())
        self.console.print(
            f"saved {made.path.name}{f', milestone {made.milestone}' if made.milestone else ''} (training waited "
            f"{saved.stall_seconds:.2f} s, the rest took {saved.write_seconds:.2f} s)"
        )

    def _on_hang(self, reason: str) -> None:
        if self.world.rank == 0:
            self.run.write_outcome("failed", self.step, self.tokens, reason=reason)

    def _keep(self, checkpoint: Checkpoint) -> None:
        if self.uploads:
            self.uploads.add(checkpoint)

    def _weights_finite(self) -> bool:
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters())
        return all(bool(torch.isfinite(p).all()) for p in local)


def run_training(
    experiment: Experiment,
    home: Home,
    until: int,
    *,
    supersede: bool = False,
    run_path: Path | None = None,
    initial_weights: Mapping[Path, float] | None = None,
) -> Outcome:
    """Train to `until` tokens in the process group of this process, and leave `outcome.json` behind.

    Args:
        supersede: set another run in the same folder aside, instead of refusing.
        run_path: the run's folder; by default the one in `home` that the experiment's name and version say.
        initial_weights: checkpoints that a new run begins with the sum of, each times its coefficient.

    Raises:
        OpenLMError: what is wrong with the recipe, the data, the folder or the run.
    """
    if experiment.execution.hang_seconds is not None:
        record_collectives()
    world = start()
    run = RunFolder(run_path or home.run(experiment.name, experiment.version))
    datasets = [open_dataset(d, home) for d in experiment.training_datasets()]
    versions = {d.name: opened.version for d, opened in zip(experiment.training_datasets(), datasets)}
    began = world.from_rank0(lambda: parent_identity(experiment, home))
    identity = run_identity(experiment, versions, began)
    if initial_weights:
        identity["initial_weights"] = world.from_rank0(lambda: weights_identity(initial_weights))

    def held() -> Outcome:
        world.from_rank0(lambda: run.claim(experiment, identity, supersede=supersede))
        world.from_rank0(run.clear_outcome)  # of an earlier process: until this one ends there is none
        trainer = None
        try:
            uploads = _uploads(experiment, run) if world.rank == 0 else None
            if experiment.execution.upload_to:
                world.from_rank0(lambda: uploads.start(experiment.steps(until)))
            trainer = Trainer(
                experiment, home, world, datasets, uploads, run=run, initial_weights=initial_weights,
                start_tokens=began["tokens"] if began else 0,
            )  # fmt: skip
            trainer.console.print(f"run {run.path} ({short(run.fingerprint)})")
            with trainer.watchdog.watching():
                outcome = trainer.train(until)
        except BaseException as e:
            if run.read_outcome() is None:  # another rank may have failed first, and this one for the lack of it
                step, tokens = (trainer.step, trainer.tokens) if trainer else (0, 0)
                run.write_outcome("failed", step, tokens, reason=str(e) or type(e).__name__)
            raise
        else:
            if world.rank == 0:
                run.write_outcome(outcome.status, outcome.step, outcome.tokens)
                if trainer.uploads:
                    trainer.uploads.finish()
        finally:
            if trainer:
                trainer.close()
        return outcome

    if world.rank != 0:
        world.from_rank0(None)
        return held()
    return _hold_lock(run, world, held)


def _uploads(experiment: Experiment, run: RunFolder) -> Uploads | None:
    execution = experiment.execution
    if not execution.upload_to:
        return None
    url = join(execution.upload_to, f"{experiment.name}/{experiment.version}")
    return Uploads(run, url, keep=execution.keep_checkpoints, warn=lambda m: print(f"warning: {m}", flush=True))


def _hold_lock(run: RunFolder, world: World, held) -> Outcome:
    """Rank 0 holds the run's lock for its lifetime; if it cannot, every rank hears of it."""
    lock = run.lock()
    world.from_rank0(lock.__enter__)
    try:
        return held()
    finally:
        lock.__exit__(None, None, None)
