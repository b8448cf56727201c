"""The training loop, top to bottom: milestones, steps, records and checkpoints. What else is done, hooks do."""

import math
import time
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.tensor import DTensor

from openlm_pipeline.checkpoints.folders import (
    Checkpoint,
    list_checkpoints,
    promote,
    put_away_damaged,
    rotate,
    verify,
)
from openlm_pipeline.errors import TrainingError
from openlm_pipeline.experiments import Experiment
from openlm_pipeline.experiments.choices import unread_settings
from openlm_pipeline.models.transformer import IGNORE_INDEX
from openlm_pipeline.runs.dry_run import size_line
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.layout import layout
from openlm_pipeline.shards.dataset import ShardedDataset
from openlm_pipeline.shards.opening import open_dataset
from openlm_pipeline.storage.home import Home
from openlm_pipeline.units import format_tokens
from train import saver as checkpoints
from train.attention_backend import attention_kernels
from train.beginning import Beginning
from train.data import Batches, check_ids
from train.distributed import World
from train.hooks import Hooks, Step
from train.hooks.metrics import console_text
from train.masking import Masking, ModelInput
from train.optimizers import make_optimizer
from train.parallel import build_model, has_bf16, use_deterministic_algorithms
from train.signals import StopRequest


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
        *,
        run: RunFolder | None = None,
        initial_weights: Mapping[Path, float] | None = None,
        start_tokens: int = 0,
        allow: Collection[str] = (),
    ) -> None:
        """
        Args:
            initial_weights: see `run_training`.
            start_tokens: of the parent's checkpoint, where the experiment is a fork.
            allow: consents, as in `run_training`.
        """
        self.allow = allow
        self.experiment, self.home, self.world = experiment, home, world
        self.run = run or RunFolder(home.run(experiment.name, experiment.version))
        self.held_out = {d.name: open_dataset(d, home) for d in experiment.validation_datasets()}
        """Validated on."""
        for held_out in self.held_out.values():
            check_ids(held_out, experiment.model_config_resolved().vocab_size)
        self.stop = StopRequest()
        self.console = Console(quiet=world.rank != 0, highlight=False, width=200, soft_wrap=True)
        identity = world.from_rank0(lambda: self.run.identity)
        self.batches = Batches(experiment, datasets, world.rank, world.size, identity)
        if experiment.execution.deterministic:
            use_deterministic_algorithms()
        opened = [*datasets, *self.held_out.values()]
        self.masking = Masking(experiment.training, {d.info["eot_id"] for d in opened})
        self.model = build_model(experiment, world)
        self.optimizer = make_optimizer(experiment.training, self.model)
        self.step = start_tokens // experiment.training.global_batch
        self.beginning = Beginning(experiment, home, world, initial_weights)
        self.lr_after = experiment.learning_rates(start_tokens)
        """The learning rate of the step after so many."""
        self.saver = checkpoints.Saver(
            self.run.checkpoints,
            world.from_rank0(lambda: self.run.fingerprint),
            world,
            asynchronous=experiment.execution.async_save,
            on_written=self.run.sync_metrics,
            on_saved=self._on_saved,
        )
        self.target = self.step
        """The step that is trained to."""
        self.hooks = Hooks(self)
        for sentence in unread_settings(experiment.training):
            self.warn(sentence)
        self.console.print(
            f"{experiment.name}: {size_line(self.model.config, experiment.seq_len)}; on {world.size} x "
            f"{world.device.type}, {self.batches.global_sequences} sequences of {experiment.seq_len} tokens per step"
        )
        for note in layout(experiment, world.size, world.per_node).notes:
            self.console.print(note)
        if experiment.training.precision == "bf16" and not has_bf16(world.device):
            self.console.print("this processor has no bfloat16 instructions: training.precision=fp32 may be faster")

    @property
    def tokens(self) -> int:
        return self.step * self.experiment.training.global_batch

    def train(self, until: int) -> Outcome:
        """Make every milestone up to `until` tokens that is not there, each from the newest checkpoint before it, and a
        checkpoint at `until` where no milestone is."""
        try:
            for hook in self.hooks:
                hook.at_start(until)
            with attention_kernels(self.experiment, self.world, self.run.attention_file, self.console.print):
                return self._make_milestones(until)
        finally:
            for hook in self.hooks:
                hook.at_end()

    def _make_milestones(self, until: int) -> Outcome:
        steps = self.experiment.steps
        goals: list[tuple[str | None, int]] = [
            (label, steps(tokens)) for label, tokens in self.experiment.labelled_milestones() if tokens <= until
        ]
        if all(step < steps(until) for _, step in goals):
            goals.append((None, steps(until)))  # any checkpoint as far as that will do
        being_saved: set[tuple[str | None, int]] = set()
        while True:
            there = {(m, c.step) for c in self.world.from_rank0(self._list) for m in (c.milestone, None)} | being_saved
            furthest = max((step for _, step in there), default=0)
            goal = next(((m, step) for m, step in goals if (m, step) not in there and (m or step > furthest)), None)
            if goal is None and being_saved:
                being_saved = set()
                self.saver.wait()
                continue
            if goal is None:
                step = max(self.step, goals[-1][1])
                return Outcome("completed", step, step * self.experiment.training.global_batch)
            label, step = goal
            if not self._go_to_start(step):
                continue  # what was taken for a milestone was damaged: there is an earlier one to make
            if not (self._train_to(step) and self._reach(label)):
                if (None, self.step) not in there:
                    self._save(milestone=None)
                self.saver.wait()
                return Outcome("preempted", self.step, self.tokens)
            being_saved.add(goal)

    def _list(self) -> list[Checkpoint]:
        return list_checkpoints(self.run.checkpoints, self.run.fingerprint, self.warn)

    def warn(self, message: str) -> None:
        self.console.print(f"warning: {message}")

    def _go_to_start(self, target: int) -> bool:
        """Load the newest intact checkpoint up to `target`, unless the weights in memory are at least as far.

        False, with nothing loaded, where a milestone turned out to be damaged and was set aside.
        """

        here = self.step if self.step <= target else -1
        newest, milestone_lost = self._newest_intact(here, target)
        if milestone_lost:
            return False
        if newest is not None:
            changeable = ("stability",)  # a run may be resumed with another policy
            checkpoints.load(newest, self.model, self.optimizer, self.hooks.state(), optional=changeable)
            self.step = newest.step
            self.console.print(f"resumed from {newest.path.name} ({format_tokens(newest.tokens)} tokens)")
        elif here < 0:
            raise TrainingError(f"no intact checkpoint to go back to step {target} from; start the run again")
        elif not self.beginning.is_over:
            loaded = self.beginning.load(self.model, self.optimizer, self.hooks.state(), self.console)
            for hook in self.hooks:
                hook.at_beginning(loaded)
        self.beginning.is_over = True
        for hook in self.hooks:
            hook.at_resume()
        return True

    def _newest_intact(self, after: int, up_to: int) -> tuple[Checkpoint | None, bool]:
        """The newest checkpoint of a step after `after` and up to `up_to` whose files all verify, each rank looking at
        its share; and whether a damaged milestone was put away on the way to it."""
        milestone_lost = False

        def newest() -> Checkpoint | None:
            return next((c for c in reversed(self._list()) if after < c.step <= up_to), None)

        while (checkpoint := self.world.from_rank0(newest)) is not None:
            share = {"rank": self.world.rank, "world_size": self.world.size}
            damage = self.world.first_error(partial(verify, checkpoint, **share))
            if damage is None:
                break
            self.world.from_rank0(partial(put_away_damaged, checkpoint, damage, self.warn, self.allow))
            milestone_lost = milestone_lost or checkpoint.milestone is not None
        return checkpoint, milestone_lost

    def _train_to(self, target: int) -> bool:
        """Step until `target`; False if a signal asked to stop before."""
        self.target = target
        every = self.experiment.execution.checkpoint_every
        save_every = self.experiment.steps(every) if every else None
        kept = self._kept_before()
        with closing(self.batches.from_step(self.step)) as batches:
            while self.step < target:
                for hook in self.hooks:
                    hook.before_step()
                waiting = time.perf_counter()
                batch = next(batches)
                waited = time.perf_counter() - waiting
                self._optimizer_step(batch.to(self.world.device, non_blocking=True), waited)
                if self.step % self.experiment.execution.log_every == 0 or self.step == target:
                    self._log()
                self.hooks.between_steps()
                for hook in self.hooks:
                    hook.before_agreement()
                ends = self.world.any(self.stop.requested or self.saver.failed)
                for hook in self.hooks:
                    hook.after_agreement()
                if ends:
                    self.saver.wait()  # raises what went wrong in a save
                    return False
                due = save_every and self.step % save_every == 0 or self.step in kept
                if due and self.step < target:
                    self._save(milestone=None)
        return True

    def _kept_before(self) -> dict[int, str]:
        """Steps at which a checkpoint is kept for a milestone after it, and that milestone's label."""
        if not (steps := self.experiment.execution.keep_before_milestone):
            return {}
        return {self.experiment.steps(tokens) - steps: label for label, tokens in self.experiment.labelled_milestones()}

    def _optimizer_step(self, batch: torch.Tensor, waited: float) -> None:
        """One step on this rank's samples [local_sequences, seq_len + 1], for which it waited some seconds."""
        training = self.experiment.training
        lr = self.lr_after(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs = [self.masking(samples) for samples in batch.split(self.batches.micro_batch)]
        num_targets = self._count_targets(inputs)
        loss = torch.zeros((), device=self.world.device)
        for i, x in enumerate(inputs):
            self.model.set_requires_gradient_sync(i == len(inputs) - 1)
            ce_sum, z_sum = self.model(x.ids_BS, x.targets_BS, documents_BS=x.documents_BS, with_z=training.z_loss > 0)
            total = ce_sum if z_sum is None else ce_sum + training.z_loss * z_sum
            # FSDP averages gradients over ranks; times world size this is the mean over the global batch's targets.
            (total * self.world.size / num_targets).backward()
            loss += ce_sum.detach() / num_targets
        grad_norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), training.grad_clip or math.inf)
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        step = Step(lr, loss, grad_norm, waited, num_targets)
        taken = self.hooks.accept(step)
        if taken:
            self.optimizer.step()
        self.step += 1
        for hook in self.hooks:
            hook.after_step(step, taken)
        self.optimizer.zero_grad()

    def _count_targets(self, inputs: list[ModelInput]) -> torch.Tensor | int:
        """Targets in the global batch; where some are masked a number on the device, which nobody waits for."""
        if not self.masking.masks_targets:
            return self.experiment.training.global_batch
        counts = torch.stack([(x.targets_BS != IGNORE_INDEX).sum() for x in inputs])
        return self.world.sum(counts.sum()).clamp(min=1)  # a batch without targets has loss 0, not 0/0

    def _log(self) -> None:
        """Append a record; stop all ranks where the loss is not finite, before anything is saved."""
        record = self.hooks.record()
        if "loss" not in record:
            return  # all steps since the last one were left out
        if not math.isfinite(record["loss"]) or not math.isfinite(record["grad_norm"]):
            raise TrainingError(
                f"loss {record['loss']}, gradient norm {record['grad_norm']} at step {self.step}: not finite. The last "
                "checkpoint before it is kept; lower the learning rate, or look at the data of these steps"
            )
        self.write_record(record)
        self.console.print(f"step {self.step:>7}  {format_tokens(self.tokens):>9} tokens  {console_text(record)}")

    def write_record(self, record: dict[str, float | None]) -> None:
        """A record of this step, to `metrics.jsonl` and to the hooks."""
        if self.world.rank == 0:
            record = {"step": self.step, "tokens": self.tokens, **record}
            self.run.append_metrics(record)
            for hook in self.hooks:
                hook.at_record(record)

    def close(self) -> None:
        """End what watches this process."""
        for hook in self.hooks:
            hook.close()
        self.saver.close(self.warn)

    def _reach(self, label: str | None) -> bool:
        """Whether the milestone, or a checkpoint without a label, is being saved; not, if a signal asked to stop while
        the milestone was validated."""
        if label is None:
            self._save(milestone=None)
            return True
        self.saver.wait()
        metrics = self.hooks.at_milestone()
        if self.world.any(self.stop.requested):
            return False
        here = [c for c in self.world.from_rank0(self._list) if c.step == self.step]
        if here:  # a rotating checkpoint stands exactly here, from before this was a milestone
            self.world.from_rank0(lambda: self._promote(here[0], label, metrics))
        else:
            self._save(milestone=label, metrics=metrics)
        return True

    def _save(self, milestone: str | None, metrics: dict[str, float] | None = None) -> None:
        if self.world.any(not self._weights_finite()):
            raise TrainingError(f"weights are not finite at step {self.step}; nothing was saved")
        began = time.perf_counter()
        self.saver.save(
            self.model,
            self.optimizer,
            self.hooks.state(),
            step=self.step,
            tokens=self.tokens,
            milestone=milestone,
            before_milestone=None if milestone else self._kept_before().get(self.step),
            metrics=metrics or {},
        )
        self.hooks.paused_seconds += time.perf_counter() - began

    def _on_saved(self, saved: checkpoints.Saved) -> None:
        """On rank 0, in the thread that wrote the checkpoint."""
        made = saved.checkpoint
        self.run.append_ledger("saved", step=made.step, stall_seconds=round(saved.stall_seconds, 3))
        self._keep(made)
        rotate(self._list(), self.experiment.execution.keep_checkpoints, self.hooks.holds())
        self.console.print(
            f"saved {made.path.name}{f', milestone {made.milestone}' if made.milestone else ''} (training waited "
            f"{saved.stall_seconds:.2f} s, the rest took {saved.write_seconds:.2f} s)"
        )

    def _promote(self, checkpoint: Checkpoint, label: str, metrics: dict[str, float]) -> None:
        self.run.sync_metrics()
        self._keep(promote(checkpoint, label, metrics))

    def _keep(self, checkpoint: Checkpoint) -> None:
        for hook in self.hooks:
            hook.at_checkpoint(checkpoint)

    def _weights_finite(self) -> bool:
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters())
        return all(bool(torch.isfinite(p).all()) for p in local)
