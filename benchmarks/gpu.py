"""What one GPU reaches: speed, MFU and memory of the shipped recipes, and the fastest settings found for each model.

    python benchmarks/gpu.py [--out FOLDER] [--seconds 540] [--only 1b 411m ...] [--shards FOLDER] [--tiny]

Drives the trainer itself, real loop, optimizer and loader, on shards of real text. The most valuable measurement comes
first, and each is one line of `results.jsonl`; `results.md` and `results.png` are made at the end, also where a run is
interrupted. A switch is tried on top of the fastest setting found so far for its model, and is kept if it computes the
same and is faster. The exit status is 1 where a target was measured and missed. `--tiny` runs the same code on tiny
models, on a CPU too: a test that it runs, not a measurement.
"""

import sys
from pathlib import Path

# Beside this file is one with the name of the standard module `tokenize`, so this folder must not be searched.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch._functorch.config
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.measure import machine, make_shards, table
from benchmarks.trainer import ready_trainer
from openlm_pipeline.runs.estimates import estimate_memory, peak_flops
from openlm_pipeline.storage.home import Home
from train.distributed import World, leave_process_group, start

Settings = dict[str, str]
"""Overrides of a recipe, and two that no recipe has yet: `attention`, a back end of SDPA, and `allocator`."""
OUTSIDE_RECIPES = {"attention", "allocator"}


@dataclass(frozen=True)
class Model:
    """A shipped recipe, as it is measured on one GPU."""

    sequences: int
    """Of a step, so that it has several micro-batches."""
    micro_batch: int
    target: float | None
    """Tokens/s on an H100 SXM."""
    settings: Settings = field(default_factory=dict)


MODELS = {
    "1b": Model(32, 8, 60_000),
    "411m": Model(64, 16, 165_000),
    "160m": Model(128, 32, 370_000),
    # With fp32 weights and AdamW's state it would need 110 GB; with a second micro-batch 28 GB more for gradients; with
    # gathered weights that stay 14 GB more.
    "7b": Model(
        2, 2, None,
        {
            "training.state_precision": "bf16",
            "execution.activation_checkpointing": "full",
            "execution.reshard_after_forward": "true",
        },
    ),
}  # fmt: skip
SAME_RESULTS: dict[str, Settings] = {
    "cudnn attention": {"attention": "CUDNN_ATTENTION"},
    "flash attention": {"attention": "FLASH_ATTENTION"},
    "efficient attention": {"attention": "EFFICIENT_ATTENTION"},
    "no reshard": {"execution.reshard_after_forward": "false"},
    "expandable segments": {"allocator": "expandable_segments:True"},
    "loss chunk 8192": {"execution.loss_chunk": "8192"},
    "whole loss": {"execution.loss_chunk": "1000000"},
    "selective checkpointing": {"execution.activation_checkpointing": "selective"},
    "full checkpointing": {"execution.activation_checkpointing": "full"},
    "no compile": {"execution.compile": "false"},
}
"""Switches that change how a step is computed, up to rounding: the fastest are kept."""
OTHER_RESULTS: dict[str, Settings] = {
    "document mask": {"training.document_mask": "true"},
    "float8": {"training.float8": "true"},
    "muon": {"training.optimizer": "muon"},
}
"""Switches that change what is trained: only measured."""
LARGER = "larger micro-batch"
"""Twice the micro-batch, and again until memory runs out."""
PLAN = [
    ("1b", "base"), ("1b", "cudnn attention"), ("1b", "no reshard"), ("1b", LARGER), ("1b", "loss chunk 8192"),
    ("411m", "base"), ("160m", "base"), ("411m", LARGER), ("160m", LARGER),
    ("7b", "base"), ("7b", "selective checkpointing"), ("7b", LARGER),
    ("1b", "no compile"), ("1b", "float8"), ("1b", "document mask"), ("1b", "selective checkpointing"), ("1b", "muon"),
    ("1b", "flash attention"), ("1b", "efficient attention"), ("1b", "whole loss"), ("1b", "expandable segments"),
    ("1b", "full checkpointing"), ("160m", "loss chunk 8192"), ("411m", "loss chunk 8192"), ("160m", "no compile"),
]  # fmt: skip
KEPT_IF_FASTER = 1.005
NOT_CARRIED = {"execution.micro_batch", "execution.activation_checkpointing"}
"""What the best setting of one model says nothing about for the next."""
MAX_DATA_WAIT = 0.001
TIMED_STEPS = 4
"""As many come before them: the first step, which compiles, and those that warm up."""
TINY = ["model={hidden_dim: 64, n_layers: 2, n_heads: 2, vocab_size: 8192}", "seq_len=64"]
GIB = 2**30


class Results:
    """The lines written so far, and the best setting of each model."""

    def __init__(self, out: Path) -> None:
        self.out, self.lines = out, []
        out.mkdir(parents=True, exist_ok=True)
        (out / "results.jsonl").write_text("")

    def add(self, what: str, **record: Any) -> None:
        self.lines.append({"what": what, **record})
        line = json.dumps(self.lines[-1])
        print(line, flush=True)
        with (self.out / "results.jsonl").open("a") as f:
            f.write(line + "\n")

    def all(self, what: str) -> list[dict[str, Any]]:
        return [line for line in self.lines if line["what"] == what]


def why_not(settings: Settings, device: torch.device) -> str | None:
    """What these settings need and is not here."""
    if OUTSIDE_RECIPES & settings.keys() and device.type != "cuda":
        return f"{', '.join(sorted(OUTSIDE_RECIPES & settings.keys()))} can be chosen on a GPU alone"
    if settings.get("training.float8") == "true" and importlib.util.find_spec("torchao") is None:
        return "torchao is not installed"
    return None


@contextlib.contextmanager
def outside_recipes(settings: Settings) -> Iterator[None]:
    """The attention back end and the allocator of `settings` inside the `with` block."""
    with contextlib.ExitStack() as stack:
        if "attention" in settings:
            stack.enter_context(sdpa_kernel(SDPBackend.__members__[settings["attention"]]))
        if "allocator" in settings:
            torch.cuda.memory._set_allocator_settings(settings["allocator"])
            stack.callback(torch.cuda.memory._set_allocator_settings, "expandable_segments:False")
        yield


def host_syncs(step: Callable[[], None]) -> list[str]:
    """Where a step waits for the device, `file:line`."""
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = (w for w in seen if "synchronizing CUDA operation" in str(w.message))
    return sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits})


def watch_kernels(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Share of a step in which the GPU computes nothing, and the kernels that take longest: name, ms, calls."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as watched:
        step()
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    kernels = [e for e in watched.events() if e.device_type == kind and not e.is_user_annotation]
    ranges = sorted((e.time_range.start, e.time_range.end, e.name) for e in kernels)
    busy, until, milliseconds, calls = 0.0, -math.inf, Counter(), Counter()
    for began, ended, name in ranges:
        busy += max(0.0, ended - max(began, until))
        until = max(until, ended)
        milliseconds[name] += (ended - began) / 1e3
        calls[name] += 1
    top = [[name[:80], round(ms, 2), calls[name]] for name, ms in milliseconds.most_common(10)]
    return {"gpu_idle_share": round(1 - busy / (until - ranges[0][0]), 4) if ranges else None, "top_kernels": top}


def measure(model: str, settings: Settings, number: int, shards: str, home: Home, world: World, tiny: bool) -> dict:
    """Train some steps; what a line says of them.

    Whatever these settings can't have here is raised: too little memory, a missing kernel.
    """
    cuda = world.device.type == "cuda"
    synchronize = torch.cuda.synchronize if cuda else (lambda: None)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    planned, seq_len = MODELS[model], 64 if tiny else 2048
    micro_batch = int(settings["execution.micro_batch"])
    sequences = max(planned.sequences, micro_batch) // (16 if tiny else 1) or 1
    overrides = [
        f"sources=[{{name: text, shards: '{shards}'}}]",
        f"version=v{number}",
        *(TINY if tiny else []),
        f"training.global_batch={sequences * seq_len}",
        f"milestones=[{sequences * seq_len * 1000}]",
        "training.warmup=0",
        "training.schedule=constant",
        "training.lr=1e-5",  # of a warm-up's beginning: a recipe's own could end in a loss that is not finite
        "evaluation=null",
        "execution.checkpoint_every=null",
        f"execution.log_every={TIMED_STEPS}",
        *(f"{key}={value}" for key, value in settings.items() if key not in OUTSIDE_RECIPES),
    ]
    with outside_recipes(settings), ready_trainer(f"pretrain_{model}", overrides, home, world) as trainer:
        began = time.perf_counter()
        trainer._train_to(1)  # ends with a record, which waits for the device
        first = time.perf_counter() - began
        trainer._train_to(2 * TIMED_STEPS)  # the second record is of the timed steps, whose loader is under way
        record = trainer.run.read_metrics()[-1]
        batch = trainer.batches.load(trainer.step)

        def step() -> None:
            trainer._optimizer_step(batch.to(world.device, non_blocking=True), 0.0)

        syncs = host_syncs(step) if cuda else []
        synchronize()
        began = time.perf_counter()
        step()
        queued = time.perf_counter() - began
        synchronize()
        queue_share = queued / (time.perf_counter() - began)

        def whole_step() -> None:
            step()
            synchronize()

        estimate = estimate_memory(trainer.experiment, 1).total
        return {
            "tokens_per_second": round(record["tokens_per_second"], 1),
            "mfu": record["mfu"] and round(record["mfu"], 4),
            "loss": round(record["loss"], 3),
            "micro_batch": trainer.batches.micro_batch,
            "peak_gib": round(record["memory_bytes"] / GIB, 2),
            "reserved_gib": round(record["memory_reserved_bytes"] / GIB, 2),
            "estimate_gib": round(estimate / GIB, 2),
            "first_step_seconds": round(first, 1),
            "data_wait_share": round(record["data_wait_fraction"], 6),
            "queue_share": round(queue_share, 3),
            "host_syncs": syncs,
            **watch_kernels(whole_step, world.device),
        }


def run_plan(results: Results, arguments: argparse.Namespace, world: World, home: Home, shards: str) -> None:
    """Measure what the time allows; the rest is left out by name."""
    ends, time_is_up = arguments.began + arguments.seconds, f"the time is up: --seconds {arguments.seconds:g}"
    durations = [0.0]
    base = {"training.precision": "bf16", "execution.compile": "true"}
    if world.device.type == "cpu":
        base["execution.compile"] = "false"  # the code that is generated takes a minute to compile
    best: dict[str, tuple[float, Settings]] = {}
    carried: Settings = {}
    number = 0

    def tried(model: str, switch: str, settings: Settings) -> bool:
        """Whether it could be measured."""
        nonlocal number
        named = {"model": model, "switch": switch, "settings": settings}
        reason = why_not(settings, world.device)
        if reason is None and time.monotonic() + max(durations[-3:]) > ends:
            reason = time_is_up
        if reason:
            results.add("left out", **named, reason=reason)
            return False
        number += 1
        began, reason = time.monotonic(), None
        try:
            with contextlib.redirect_stdout(sys.stderr):
                found = measure(model, settings, number, shards, home, world, arguments.tiny)
        except Exception as e:  # noqa: BLE001 - the line says it, and the next measurement may work
            traceback.print_exc()
            reason = " ".join(f"{type(e).__name__}: {e}".split())[:500]
        torch._dynamo.reset()
        gc.collect()  # after the error is gone, which holds frames with tensors
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        durations.append(time.monotonic() - began)
        if reason:
            results.add("failed", **named, reason=reason)
            return False
        before = best.get(model)
        kept = switch not in OTHER_RESULTS and (
            before is None or found["tokens_per_second"] > KEPT_IF_FASTER * before[0]
        )
        times = round(found["tokens_per_second"] / before[0], 3) if before else None
        results.add("speed", **named, times_best_before=times, kept=kept, **found)
        if kept:
            best[model] = (found["tokens_per_second"], settings)
            changed = {k: v for k, v in settings.items() if k not in NOT_CARRIED | MODELS[model].settings.keys()}
            carried.update(changed)
        return True

    def follow(model: str, switch: str) -> None:
        planned = MODELS[model]
        begin_with = {**base, **carried, **planned.settings, "execution.micro_batch": str(planned.micro_batch)}
        settings = best[model][1] if model in best else begin_with
        if switch != LARGER:
            tried(model, switch, {**settings, **{**SAME_RESULTS, **OTHER_RESULTS, "base": {}}[switch]})
            return
        micro_batch = 2 * int(settings["execution.micro_batch"])
        while tried(model, switch, {**settings, "execution.micro_batch": str(micro_batch)}) and not arguments.tiny:
            micro_batch *= 2

    for model, switch in PLAN:
        if arguments.only and model not in arguments.only:
            continue
        try:
            follow(model, switch)
        except KeyboardInterrupt:
            ends, time_is_up = 0.0, "interrupted"
            results.add("left out", model=model, switch=switch, reason="interrupted")


def judge(results: Results, device: str) -> list[str]:
    """Write the best setting of each model beside its target; what was measured and missed.

    Targets of speed are an H100 SXM's, so they hold for GPUs with its peak.
    """
    missed = []
    speeds = results.all("speed")
    for model in dict.fromkeys(line["model"] for line in speeds):
        best = [line for line in speeds if line["model"] == model and line["kept"]][-1]
        target, reached = MODELS[model].target, best["tokens_per_second"]
        overrides = [f"{k}={v}" for k, v in best["settings"].items() if k not in OUTSIDE_RECIPES]
        beside = {k: v for k, v in best["settings"].items() if k in OUTSIDE_RECIPES}
        of_target = round(reached / target, 3) if target else None
        results.add(
            "best", model=model, tokens_per_second=reached, mfu=best["mfu"], target=target, of_target=of_target,
            overrides=overrides, outside_recipes=beside,
        )  # fmt: skip
        if target and reached < target and peak_flops(device, "bf16") == peak_flops("H100", "bf16"):
            missed.append(f"{model}: {reached:,.0f} tokens/s of {target:,.0f}")
    for line in speeds:
        where = f"{line['model']}, {line['switch']}"
        if line["data_wait_share"] >= MAX_DATA_WAIT:
            missed.append(f"{where}: {line['data_wait_share']:.2%} of the time waits for data")
        if line["host_syncs"]:
            missed.append(f"{where}: a step waits for the device at {', '.join(line['host_syncs'])}")
    return missed


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def write_report(results: Results, about: str, missed: list[str]) -> None:
    """`results.md`, and `results.png` where matplotlib is installed."""
    header = [
        "model", "switch", "micro-batch", "tokens/s", "times best before", "MFU", "peak GiB (reserved; dry run's)",
        "GPU idle", "queueing", "data wait", "first step, s", "host syncs",
    ]  # fmt: skip
    rows = [
        [
            r["model"], r["switch"] + (" (kept)" if r["kept"] else ""), str(r["micro_batch"]),
            f"{r['tokens_per_second']:,.0f}", str(r["times_best_before"] or ""), share(r["mfu"]),
            f"{r['peak_gib']} ({r['reserved_gib']}; {r['estimate_gib']})", share(r["gpu_idle_share"]),
            share(r["queue_share"]), f"{r['data_wait_share']:.3%}", str(r["first_step_seconds"]),
            str(len(r["host_syncs"])),
        ]
        for r in results.all("speed")
    ]  # fmt: skip
    parts = [about, table(header, rows)]
    for r in results.all("best"):
        beside = "".join(f", {k} {v}" for k, v in r["outside_recipes"].items())
        target = f", {r['of_target']:.0%} of {r['target']:,.0f}" if r["target"] else ""
        parts.append(
            f"{r['model']}: {r['tokens_per_second']:,.0f} tokens/s{target}: `{' '.join(r['overrides'])}`{beside}"
        )
    parts += [
        f"{what}: {r['model']}, {r['switch']}: {r['reason']}"
        for what in ("failed", "left out")
        for r in results.all(what)
    ]
    parts += [f"missed: {m}" for m in missed]
    text = "\n\n".join(parts)
    (results.out / "results.md").write_text(text + "\n")
    print(f"\n{text}")
    if importlib.util.find_spec("matplotlib") is None:
        results.add("left out", model="all", switch="results.png", reason="matplotlib is not installed")
    elif rows:
        draw(results.all("speed"), about, results.out / "results.png")


def draw(speeds: list[dict[str, Any]], about: str, path: Path) -> None:
    """A bar of tokens/s for each measurement, by model, with the target as a line."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(r["model"] for r in speeds))
    heights = [1 + sum(r["model"] == m for r in speeds) for m in models]
    figure = Figure(figsize=(9, 1.2 + 0.35 * sum(heights)), layout="constrained")
    figure.suptitle(about, fontsize=8)
    axes = figure.subplots(len(models), 1, squeeze=False, height_ratios=heights)[:, 0]
    for model, ax in zip(models, axes):
        mine = [r for r in speeds if r["model"] == model]
        bars = ax.barh(
            range(len(mine)),
            [r["tokens_per_second"] for r in mine],
            color=["tab:blue" if r["kept"] else "tab:gray" for r in mine],
        )
        ax.bar_label(bars, [f" {r['tokens_per_second']:,.0f}  {share(r['mfu'])}" for r in mine], fontsize=8)
        ax.set_yticks(range(len(mine)), [f"{r['switch']}, {r['micro_batch']}" for r in mine], fontsize=8)
        ax.invert_yaxis()
        ax.margins(x=0.2)
        ax.set_ylabel(model)
        if MODELS[model].target:
            ax.axvline(MODELS[model].target, color="tab:red", linewidth=1)
    axes[-1].set_xlabel("tokens/s, MFU; blue: kept as the fastest; red: target on an H100 SXM")
    figure.savefig(path, dpi=130)


def shards_for(home: Path, arguments: argparse.Namespace, results: Results) -> str:
    """Where the samples come from; random ones if those of real text can't be made here."""
    if arguments.shards:
        return str(arguments.shards.resolve())
    if not arguments.tiny:
        try:
            return str(make_shards(home, 2048, files="0[01]"))
        except SystemExit as e:
            results.add("left out", model="all", switch="shards of real text", reason=str(e)[-500:])
    return "synthetic://4096/0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing more is begun; default 540")
    parser.add_argument("--only", nargs="+", choices=MODELS, help="models to measure; by default all")
    parser.add_argument("--shards", type=Path, help="a folder of ready-made shards, samples of 2,049 tokens")
    parser.add_argument("--tiny", action="store_true", help="tiny models, on a CPU too: a test of this program")
    arguments = parser.parse_args()
    arguments.began = time.monotonic()
    if not (torch.cuda.is_available() or arguments.tiny):
        sys.exit(f"torch {torch.__version__} sees no GPU; --tiny runs the same code on a CPU, and measures nothing")
    world, results = start(), Results(arguments.out)
    cuda = world.device.type == "cuda"
    name = torch.cuda.get_device_name() if cuda else "CPU"
    # What a back end of attention compiled must not be found again by another one.
    torch._functorch.config.enable_autograd_cache = False
    about = f"{name}; {machine('torch', 'triton', 'torchao')}"
    if arguments.tiny:
        about = f"tiny models, no measurement: {about}"
    memory_gib = round(torch.cuda.get_device_properties(0).total_memory / GIB, 1) if cuda else None
    results.add("machine", about=about, cuda=torch.version.cuda, memory_gib=memory_gib)
    missed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            home = Path(folder)
            run_plan(results, arguments, world, Home(home), shards_for(home, arguments, results))
        finally:
            missed = judge(results, name)
            if arguments.tiny:
                missed = []
            results.add("end", missed=missed)
            write_report(results, about, missed)
            leave_process_group()
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
