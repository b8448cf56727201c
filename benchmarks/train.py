"""Training speed on CPUs or several GPUs: tokens per second and memory, each optimisation as a switch.

    python benchmarks/train.py [--models open_lm_11m ...] [--switches base compile ...] [--shards FOLDER]
                               [--set key=value ...] [--runs 3] [--markdown OUT.md]
                               [--open-lm FOLDER --open-lm-python PYTHON]

Every measurement is a new process with the trainer itself: the real loop, optimizer and loader, on shards of real text
(`--shards`, with samples of `--seq-len` tokens; by default made from the embedded corpus). A few steps warm up, then
some are timed. A round measures every model with every switch once, so that what else the machine does touches all.
`base` is fp32; `--set` gives what all have, such as `training.precision=bf16`. What one GPU reaches tells `gpu.py`.

With `--open-lm`, a checkout of open_lm and an interpreter with what it needs, its own training loop is measured in the
same rounds on a CPU: single sequences, one thread, in fp32 and with autocast to bf16.
"""

import sys
from pathlib import Path

# Beside this file is one with the name of the standard module `tokenize`, so this folder must not be searched.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

from benchmarks.measure import machine, make_shards, ratios, run, show, spread, table
from openlm_pipeline.runs.launchers.job import MALLOC_ENVIRONMENT

MODELS = ["open_lm_11m", "open_lm_41m", "open_lm_160m"]
SWITCHES = {
    "base": [],
    "compile": ["execution.compile=true"],
    "no compile": ["execution.compile=false"],
    "fp32": ["training.precision=fp32"],
    "bf16": ["training.precision=bf16"],
    "bf16 compile": ["training.precision=bf16", "execution.compile=true"],
    "bf16 states": ["training.precision=bf16", "training.state_precision=bf16"],
    "float8": ["training.precision=bf16", "training.float8=true"],
    "selective checkpointing": ["execution.activation_checkpointing=selective"],
    "full checkpointing": ["execution.activation_checkpointing=full"],
    "loss chunk 512": ["execution.loss_chunk=512"],
    "loss chunk 8192": ["execution.loss_chunk=8192"],
    "no reshard": ["execution.reshard_after_forward=false"],
    "document mask": ["training.document_mask=true"],
    "muon": ["training.optimizer=muon"],
}


def measure(job: dict[str, Any]) -> None:
    """Child process, maybe one of torchrun's: train, and print the record of the timed steps."""
    from benchmarks.trainer import ready_trainer
    from openlm_pipeline.storage.home import Home
    from train.distributed import leave_process_group, start

    world = start()
    try:
        with ready_trainer(job["recipe"], job["overrides"], Home(Path(job["home"])), world) as trainer:
            trainer._train_to(job["warmup"])  # it ends with a log record, which waits for the device and starts anew
            began = time.process_time()
            trainer._train_to(job["warmup"] + job["steps"])
            cpu_seconds = time.process_time() - began
            if world.rank == 0:
                record = trainer.run.read_metrics()[-1]
                tokens = job["steps"] * trainer.experiment.training.global_batch / world.size
                print(json.dumps({**record, "tokens_per_cpu_second": tokens / cpu_seconds}))
    finally:
        leave_process_group()


def measure_open_lm(model: str, switch: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Record of open_lm's own training loop."""
    job = [model, switch.removeprefix("open_lm "), arguments.seq_len, arguments.warmup, arguments.steps]
    usage = run(
        [arguments.open_lm_python, str(Path(__file__).with_name("train_open_lm.py")), *map(str, job)],
        **{"OMP_NUM_THREADS": "1", **MALLOC_ENVIRONMENT, "PYTHONPATH": str(arguments.open_lm)},
    )
    seconds = json.loads(usage.output.splitlines()[-1])["seconds"]
    return {"tokens_per_cpu_second": arguments.seq_len * len(seconds) / sum(seconds), "peak_mib": usage.peak_mib}


def comparison_table(seen: dict[tuple[str, str], list[dict[str, Any]]], seq_len: int) -> str:
    """One row a model and switch; how many times as fast as open_lm in the same precision, within a round."""
    rows = []
    for (model, switch), records in seen.items():
        rates = [r["tokens_per_cpu_second"] for r in records]
        theirs = seen[model, "open_lm bf16" if "bf16" in switch else "open_lm fp32"]
        times = [rate / r["tokens_per_cpu_second"] for rate, r in zip(rates, theirs)]
        peak = max(r["peak_mib"] for r in records) / 1024
        rows.append([model, switch, spread([seq_len / rate for rate in rates]), spread(times), f"{peak:.1f}"])
    return table(["model", "switch", "CPU-seconds per step", "times as fast as open_lm", "peak GiB"], rows)


def settings_of(model: str, switch: str, arguments: argparse.Namespace) -> list[str]:
    """Overrides of the recipe for one measurement; of two for one setting the later counts."""
    sequences = arguments.micro_batch * arguments.accumulate * arguments.processes
    return [
        f"model={{name: {model}}}",
        f"training.global_batch={sequences * arguments.seq_len}",
        f"milestones=[{sequences * arguments.seq_len * (arguments.warmup + arguments.steps)}]",
        f"execution.micro_batch={arguments.micro_batch}",
        *arguments.set,
        *SWITCHES[switch],
    ]


def results_table(seen: dict[tuple[str, str], list[dict[str, Any]]], cuda: bool) -> str:
    """One row a model and switch; times as fast as `base` are of the same round."""
    rate = "tokens_per_second_per_gpu" if cuda else "tokens_per_cpu_second"
    header = ["model", "switch", "tokens/s", "tokens/s a GPU" if cuda else "tokens per CPU-second", "times base"]
    header += ["MFU"] if cuda else ["GFLOP per CPU-second"]
    header += ["memory, GB", "data wait"]
    rows = []
    for (model, switch), records in seen.items():
        rates = {s: [r[rate] for r in seen[model, s]] for m, s in seen if m == model}
        times = spread(ratios(rates, "base")[switch]) if "base" in rates else ""
        if cuda:
            mfu = [r["mfu"] for r in records]
            use = "unknown device" if None in mfu else spread([100 * m for m in mfu], 1) + " %"
        else:
            flops = [r["flops_per_second_per_gpu"] / r["tokens_per_second_per_gpu"] * r[rate] for r in records]
            use = spread([f / 1e9 for f in flops], 1)
        rows.append(
            [
                model,
                switch,
                f"{statistics.median(r['tokens_per_second'] for r in records):,.0f}",
                spread([r[rate] for r in records], 0 if cuda else 1),
                times,
                use,
                f"{max(r['memory_bytes'] for r in records) / 1e9:.2f}",
                f"{statistics.median(r['data_wait_fraction'] for r in records):.2%}",
            ]
        )
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help=f"by default {', '.join(MODELS)}")
    parser.add_argument("--switches", nargs="+", default=[], choices=SWITCHES, help="what to measure beside `base`")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="settings of every measurement")
    parser.add_argument("--shards", type=Path, help="a folder of ready-made shards")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--micro-batch", type=int, default=1, help="sequences at a time")
    parser.add_argument("--accumulate", type=int, default=1, help="micro-batches per step")
    parser.add_argument("--processes", type=int, default=1, help="of torchrun, one per GPU")
    parser.add_argument("--warmup", type=int, default=1, help="steps")
    parser.add_argument("--steps", type=int, default=2, help="timed ones")
    parser.add_argument("--runs", type=int, default=3, help="rounds")
    parser.add_argument("--open-lm", type=Path, help="a checkout of open_lm, to compare with")
    parser.add_argument("--open-lm-python", default=sys.executable, help="interpreter that can import it")
    parser.add_argument("--markdown", type=Path, help="write the results here too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return measure(json.loads(arguments.child))
    probe = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    device = run([sys.executable, "-c", probe]).output.strip()
    cuda = bool(device)
    switches = list(dict.fromkeys(["base", *arguments.switches]))
    if arguments.open_lm:
        switches = ["open_lm fp32", "open_lm bf16", *switches]
    launcher = [sys.executable]
    if arguments.processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={arguments.processes}"]
    seen: dict[tuple[str, str], list[dict[str, Any]]] = {(m, s): [] for m in arguments.models for s in switches}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        shards = arguments.shards.resolve() if arguments.shards else make_shards(home, arguments.seq_len)
        recipe = home / "benchmark.yaml"
        settings = {
            "name": "benchmark", "seq_len": arguments.seq_len, "tokenizer": {"name": "none", "source": "none"},
            "sources": [{"name": "text", "shards": str(shards)}], "model": {"name": "open_lm_11m"},
            "milestones": ["1M"], "training": {"global_batch": arguments.seq_len, "lr": 1e-4, "schedule": "constant"},
            "execution": {"log_every": 1_000_000},
        }  # fmt: skip
        recipe.write_text(json.dumps(settings))
        for n in range(arguments.runs):
            for model, switch in list(seen):
                if switch.startswith("open_lm "):
                    seen[model, switch].append(measure_open_lm(model, switch, arguments))
                    continue
                overrides = settings_of(model, switch, arguments)
                job = {"recipe": str(recipe), "home": folder, "overrides": overrides}
                job |= {"warmup": arguments.warmup, "steps": arguments.steps}
                try:
                    usage = run(
                        [*launcher, __file__, "--child", json.dumps(job)], OMP_NUM_THREADS="1", **MALLOC_ENVIRONMENT
                    )
                except SystemExit as e:  # such as float8 on a device that has none, or too little memory
                    print(f"{model}, {switch} is left out: {str(e).splitlines()[-1]}", flush=True)
                    del seen[model, switch]
                    continue
                lines = reversed(usage.output.splitlines())
                record = json.loads(next(line for line in lines if line.startswith("{"))) | {"peak_mib": usage.peak_mib}
                seen[model, switch].append(record)
                print(
                    f"round {n + 1}, {model}, {switch}: {record['tokens_per_second']:,.1f} tokens/s, "
                    f"{record['tokens_per_cpu_second']:,.1f} tokens per CPU-second",
                    flush=True,
                )
    about = f"{device or 'CPU'}; {machine('torch')}; sequences of {arguments.seq_len} tokens, n = {arguments.runs}"
    results = comparison_table(seen, arguments.seq_len) if arguments.open_lm else results_table(seen, cuda)
    text = f"{about}\n\n{results}"
    show(text, arguments.markdown)
    return None


if __name__ == "__main__":
    main()
