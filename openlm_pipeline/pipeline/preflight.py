"""A look at what a recipe needs before anything is spent: data, devices, memory, disk, files, the cluster, secrets.

`preflight` is the one function of it. `openlm plan`, `launch` and `train`, the first step of a Dagster job and the
report use it, so that all of them say the same.
"""

import os
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.corpus.excluded import read_excluded
from openlm_pipeline.corpus.maps import load_map
from openlm_pipeline.errors import ConfigError, MissingInputError, OpenLMError
from openlm_pipeline.experiments import Dataset, Experiment
from openlm_pipeline.pipeline.data import located
from openlm_pipeline.registry import SAMPLINGS
from openlm_pipeline.result import Finding, refusal
from openlm_pipeline.runs import machine
from openlm_pipeline.runs.dry_run import TrainingCost, describe
from openlm_pipeline.runs.estimates import device_memory, estimate_memory, flops_per_token
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.launch import launcher_of
from openlm_pipeline.runs.rates import rate_findings
from openlm_pipeline.runs.repeats import MAX_EPOCHS, repeated
from openlm_pipeline.shards.opening import open_dataset, published_url
from openlm_pipeline.storage.home import Home
from openlm_pipeline.storage.remote import exists, is_remote, public
from openlm_pipeline.tokenization.documents import results
from openlm_pipeline.tokenizers.tokenizer import check_reachable
from openlm_pipeline.units import format_bytes, format_tokens

_UNPACKED = {".zst": 2.8, ".gz": 2.6, ".parquet": 2.2}
"""Bytes of text in a byte of a raw file, as English web text has them."""
_TEXT_PER_TOKEN = 4.3
"""Bytes, in tokenizers of 50,000 ids."""
_CONTEXT_BYTES = 1 << 30
"""What CUDA and the allocator take beside what is estimated."""
_CPU_HOURS_PER_TB = {"auto": 5.8, "gigatoken": 5.8, "huggingface": 63}
"""Of text that is tokenized and packed, by engine: docs/benchmarks.md."""
_THREADS = 16
_TAR = 1.05
"""Bytes of shards per byte of tokens."""
_CREDENTIALS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"),
    "gs": ("GOOGLE_APPLICATION_CREDENTIALS",),
    "az": ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_KEY", "AZURE_CLIENT_SECRET"),
}
_CREDENTIAL_FILES = {"s3": "~/.aws", "gs": "~/.config/gcloud", "az": "~/.azure"}


@dataclass(frozen=True)
class DataSize:
    """How much of a dataset there is."""

    name: str
    tokens: int
    raw_bytes: int
    """Of the raw files, as they are stored; 0 where the shards are there."""
    text_bytes: int
    """Of their text, about."""
    is_made: bool
    """Whether the shards are there, and the tokens exact; else they are estimated."""


def data_size(dataset: Dataset, home: Home) -> DataSize | None:
    """The size of a dataset, by its shards, or about by its raw files; None where neither is there."""
    try:
        made = open_dataset(dataset, home)
    except OpenLMError:  # not made yet; its own artefact says what is wrong with it
        pass
    else:
        return DataSize(dataset.name, len(made) * dataset.seq_len, 0, 0, True)
    try:
        raw = discover(dataset, home) if dataset.source.files else []
    except OpenLMError:
        return None
    size = sum(file.size_bytes for file in raw)
    text = sum(file.size_bytes * _UNPACKED.get(Path(file.format or file.url).suffix, 1.0) for file in raw)
    sizes = {file.name: file.size_bytes for file in raw}
    done = [made for made in results(home.tokenized(dataset.name, dataset.version)) if made.name in sizes]
    if read := sum(sizes[made.name] for made in done):
        text = size * sum(made.text_bytes for made in done) / read
        tokens = size * sum(made.tokens for made in done) / read
    else:
        tokens = text / _TEXT_PER_TOKEN
    most = dataset.source.max_tokens or int(tokens)
    return DataSize(dataset.name, min(int(tokens), most), size, int(text), False) if size else None


@dataclass(frozen=True)
class Need:
    """What is looked at: a recipe, and what of it is to be made."""

    experiment: Experiment
    home: Home
    makes: frozenset[str]
    """Names of artefacts, such as `shards/pile`."""
    until: int
    """Tokens that training goes up to."""
    device: str | None
    """A GPU by name, for what is known of none at hand."""

    def makes_any(self, kind: str) -> bool:
        return any(name.startswith(f"{kind}/") for name in self.makes)

    @property
    def trains(self) -> bool:
        return self.makes_any("checkpoint")

    @property
    def is_local(self) -> bool:
        return self.experiment.launcher.kind == "local"

    @cached_property
    def sizes(self) -> dict[str, DataSize]:
        found = {d.name: data_size(d, self.home) for d in self.experiment.datasets()}
        return {name: size for name, size in found.items() if size}

    @cached_property
    def cost(self) -> TrainingCost:
        return describe(self.experiment, self.experiment.launcher.world_size, home=self.home)

    @property
    def unmade(self) -> list[DataSize]:
        """Datasets whose shards are to be made of raw files that are there."""
        return [size for name, size in self.sizes.items() if not size.is_made and f"shards/{name}" in self.makes]

    @property
    def token_bytes(self) -> int:
        return 2 if self.experiment.model_config_resolved().vocab_size <= 1 << 16 else 4


def preflight(
    experiment: Experiment,
    home: Home,
    makes: Collection[str],
    until: int | None = None,
    device: str | None = None,
) -> list[Finding]:
    """What a recipe needs, and whether it is there: each finding ok, a warning, or a refusal with the next step.

    Args:
        makes: names of the artefacts that are to be made; only what they need is looked at.
        until: tokens that training goes up to; by default those of the last milestone.
        device: a GPU such as `H100` that it will run on, where that is another machine.
    """
    return look_ahead(Need(experiment, home, frozenset(makes), until or experiment.milestones[-1], device))


def look_ahead(need: Need) -> list[Finding]:
    """`preflight`, for whoever needs the sizes too."""
    return [finding for look in _LOOKS for finding in look(need)]


def whole(experiment: Experiment, makes: Collection[str]) -> list[Finding]:
    """A refusal to train all of a large recipe, for a run that nobody started by the recipe's name: "Materialize all"
    in the graph takes every recipe there is."""
    labels = {label for label, _ in experiment.labelled_milestones()}
    operations = flops_per_token(experiment.model_config_resolved(), experiment.seq_len) * experiment.milestones[-1]
    if operations <= machine.CPU_FLOPS or not all(f"checkpoint/{experiment.name}/{label}" in makes for label in labels):
        return []
    what = f"this run would train all of {experiment.name}: {operations:.1e} operations"
    return [refusal("whole", what, f"Launch the job {experiment.name}, or select fewer assets")]


def _data(need: Need) -> Iterator[Finding]:
    """Whether the text is enough for the milestones."""
    if not need.trains:
        return
    experiment = need.experiment
    weights = sum(source.weight for source in experiment.sources)
    for dataset in experiment.training_datasets():
        size = need.sizes.get(dataset.name)
        if size is None:
            continue
        wanted = (need.until - experiment.start_tokens()) * dataset.source.weight / weights
        epochs = wanted / max(1, size.tokens)
        about = "" if size.is_made else "about "
        there = f"{about}{format_tokens(size.tokens, 3)} tokens"
        if not size.is_made and epochs > MAX_EPOCHS:
            yield refusal(
                "repeat_data",
                f"{experiment.name} would see each text of {dataset.name} {about}{epochs:,.0f} times: "
                f"{format_tokens(need.until)} tokens, of which {there} are there",
                "Add raw text, or lower the milestones",
            )
        else:
            yield Finding("ok", f"{dataset.name} has {there}: {about}{epochs:.3g} epochs")
    yield from repeated(experiment, need.home, need.until)


def _maps(need: Need) -> Iterator[Finding]:
    """Whether the functions that documents go through may run, and the lists of what is left out are there."""
    for dataset in need.experiment.datasets():
        size = need.sizes.get(dataset.name)
        if (spec := dataset.source.map) and not (size and size.is_made):
            try:
                load_map(spec)
            except ConfigError as e:
                yield Finding("refusal", str(e))
            else:
                yield Finding("ok", f"documents of {dataset.name} go through {spec.function}")
        if (place := located(dataset, need.home).source.exclude) and not (size and size.is_made):
            try:
                records = sum(map(len, read_excluded(place).records.values()))
            except OpenLMError as e:
                yield Finding("refusal", str(e))
            else:
                yield Finding("ok", f"{records:,} records that {place} names are left out of {dataset.name}")


def _devices(need: Need) -> Iterator[Finding]:
    if not (need.trains and need.is_local):
        return
    experiment, processes = need.experiment, need.experiment.launcher.processes
    if not machine.has_gpu():
        yield from machine.without_gpu(experiment, need.until)
        cores = os.cpu_count() or 1
        if processes > cores:
            yield Finding("warning", f"{processes} trainers share {cores} CPU cores", "Lower launcher.processes")
    elif (there := machine.gpus()) and processes > len(there):
        yield Finding(
            "refusal",
            f"launcher.processes is {processes}, and this machine has {len(there)} GPUs",
            f"Set launcher.processes={len(there)}, or launcher.kind to a cluster",
        )


def _memory(need: Need) -> Iterator[Finding]:
    """Whether the peak of a step fits, and if not, on how many it would."""
    if not need.trains:
        return
    experiment, launcher = need.experiment, need.experiment.launcher
    each = need.cost.memory.total
    there = machine.gpus() if need.is_local else []
    known = device_memory(need.device) if need.device else None
    if there:
        have, where = min(gpu.memory_bytes for gpu in there), f"each {there[0].name}"
    elif known:
        have, where = known, f"each {need.device}"
    elif need.is_local and not machine.has_gpu():
        have, where = machine.memory_bytes(), "this machine"
        each = each * launcher.processes
    else:
        yield Finding("ok", f"memory: {format_bytes(each)} per GPU; --gpu names one to compare with")
        return
    on_gpu = where != "this machine"
    needed = each + (_CONTEXT_BYTES if on_gpu else 0)
    said = f"training needs {format_bytes(needed)} of memory, and {where} has {format_bytes(have)}"
    if needed <= have:
        yield Finding("ok", said)
    else:
        yield refusal("memory", said, _what_fits(experiment, have - _CONTEXT_BYTES, on_gpu))


def _what_fits(experiment: Experiment, have: int, on_gpu: bool) -> str:
    """The first changes of settings, and of the number of processes, with which a step fits into `have` bytes each."""

    def fits(processes: int, changes: dict[str, Any]) -> bool:
        execution = experiment.execution.model_copy(update=changes)
        try:
            changed = experiment.model_copy(update={"execution": execution})
            return estimate_memory(changed, processes, min(processes, 8)).total * (1 if on_gpu else processes) <= have
        except ConfigError:  # the batch does not divide over so many
            return False

    halves = [{"micro_batch": 2**n} for n in (4, 3, 2, 1, 0)]
    keep = [{"micro_batch": 1, "activation_checkpointing": how} for how in ("selective", "full")]
    own = experiment.launcher.world_size
    ways = []
    if changes := next((c for c in [*halves, *keep] if fits(own, c)), None):
        ways.append(f"with {', '.join(f'execution.{key}={value}' for key, value in changes.items())}")
    more = [2**n for n in range(10) if 2**n > own] if on_gpu else [n for n in (4, 2, 1) if n < own]
    if processes := next((n for n in more if fits(n, {})), None):
        ways.append(f"on {processes} process{'es' if processes > 1 else ''}")
    return f"It fits {', or '.join(ways)}" if ways else "Take a smaller model, or GPUs with more memory"


def _shard_cache(need: Need) -> Iterator[Finding]:
    """Whether the shards that an order reads at a time fit into the space that fetched ones may take."""
    experiment = need.experiment
    if not need.trains or (cache := experiment.execution.shard_cache_bytes) is None:
        return
    windowed = "window_shards" in SAMPLINGS[experiment.training.sampling].settings
    for dataset in experiment.training_datasets():
        ready_made = dataset.source.shards
        size = need.sizes.get(dataset.name)
        if size is None or not (is_remote(need.home.resolve(ready_made)) if ready_made else published_url(dataset)):
            continue
        samples = size.tokens / dataset.seq_len
        whole = int(samples * (dataset.seq_len + 1) * need.token_bytes * _TAR)
        window = int(whole * min(1.0, experiment.training.window_shards * dataset.samples_per_shard / max(1, samples)))
        if cache >= (window if windowed else whole):
            yield Finding("ok", f"the cache of {dataset.name} holds the shards that its order reads at a time")
        elif windowed:
            yield Finding(
                "refusal",
                f"execution.shard_cache_bytes of {format_bytes(cache)} is less than the {format_bytes(window)} of "
                f"{experiment.training.window_shards} shards of {dataset.name}, which are read together: each sample "
                "would fetch a shard",
                "Raise it, or lower training.window_shards",
            )
        else:
            yield Finding(
                "refusal",
                f"execution.shard_cache_bytes of {format_bytes(cache)} is less than the {format_bytes(whole)} of "
                f"{dataset.name}, all of which training.sampling={experiment.training.sampling} reads in turn: nearly "
                "each sample would fetch a shard",
                "Set training.sampling=windowed, or leave execution.shard_cache_bytes out",
            )


def disk_needs(need: Need) -> dict[str, int]:
    """Bytes that are still to be written below the home, at the peak, by what they are for."""
    experiment, needs = need.experiment, dict[str, int]()
    if streams := sum(size.tokens for size in need.unmade) * need.token_bytes:
        needs |= {"token streams": streams, "shards": int(streams * _TAR)}
    if missing := sum(name.startswith(f"checkpoint/{experiment.name}/") for name in need.makes):
        execution = experiment.execution
        rotating = execution.keep_checkpoints + 1 if execution.checkpoint_every else 0  # one more while it is written
        needs["milestones"] = missing * need.cost.checkpoint_bytes
        needs["rotating checkpoints"] = rotating * need.cost.checkpoint_bytes
    return {name: size for name, size in needs.items() if size}


def _disk(need: Need) -> Iterator[Finding]:
    needs, have = disk_needs(need), machine.free_disk(need.home.root)
    if not needs:
        return
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in needs.items())
    said = f"{format_bytes(sum(needs.values()))} of disk are needed ({parts}), and {format_bytes(have)} are free"
    if sum(needs.values()) <= have:
        yield Finding("ok", said)
    else:
        yield refusal("disk", f"{said} at {need.home.root}", "Free some, or set OPENLM_HOME to a larger disk")


def _tokenizer(need: Need) -> Iterator[Finding]:
    spec = need.experiment.tokenizer
    if spec.source is None or f"tokenizer/{spec.name}" not in need.makes:
        return
    try:
        check_reachable(spec.source)
    except MissingInputError as e:
        yield Finding("refusal", str(e))
    else:
        yield Finding("ok", f"the tokenizer {spec.source} is there")


def _evaluation(need: Need) -> Iterator[Finding]:
    """Whether the suite's files are there; those of the embedded corpus come with it."""
    if need.experiment.evaluation is None or not need.makes_any("scorecard"):
        return
    from openlm_pipeline.evaluation.suite import load_suite
    from openlm_pipeline.evaluation.task_files import located

    try:
        suite = load_suite(need.experiment.evaluation.suite)
        places = {located(t, need.home) for t in suite.icl_tasks if not t.dataset_uri.startswith("raw/embedded/")}
        with ThreadPoolExecutor(_THREADS) as pool:
            there = dict(zip(places, pool.map(lambda p: exists(p) if is_remote(p) else Path(p).is_file(), places)))
    except OpenLMError as e:
        yield Finding("refusal", str(e))
        return
    missing = sorted(public(place) for place, found in there.items() if not found)
    if not missing:
        yield Finding("ok", f"all files of the suite {suite.name} are there")
        return
    shown = ", ".join(missing[:2]) + (", ..." if len(missing) > 2 else "")
    yield refusal(
        "unscored",
        f"{len(missing)} of the {len(places)} files of the suite {suite.name} are not there: {shown}",
        "Set OPENLM_EVAL_DATA to the folder of LLM Foundry's scripts/eval/local_data, or evaluation.suite to another",
    )


def _rates(need: Need) -> Iterator[Finding]:
    if need.trains:
        yield from rate_findings(need.experiment, need.home, need.until)


def _launcher(need: Need) -> Iterator[Finding]:
    if not need.trains or need.is_local:
        return
    experiment, home = need.experiment, need.home
    try:
        launcher_of(experiment, home, RunFolder(home.run(experiment.name, experiment.version))).find()
    except OpenLMError as e:
        yield Finding("refusal", str(e))
    else:
        yield Finding("ok", f"the launcher {experiment.launcher.kind} answers")


def _secrets(need: Need) -> Iterator[Finding]:
    """Whether what a service or store asks for is set, by name; values are never looked at."""
    experiment, execution = need.experiment, need.experiment.execution
    if need.trains and experiment.launcher.kind != "kubernetes":  # whose pods have Secrets of their own
        yield from (Finding("refusal", missing) for missing in machine.missing_for_reports(experiment))
    urls = [need.home.url, execution.shards_url, execution.upload_to]
    urls += [url for s in experiment.sources for url in (*s.files, s.shards)]
    for protocol in sorted({url.partition("://")[0] for url in urls if url and "://" in url} & _CREDENTIALS.keys()):
        names = _CREDENTIALS[protocol]
        if not any(map(os.environ.get, names)) and not Path(_CREDENTIAL_FILES[protocol]).expanduser().exists():
            yield Finding(
                "warning",
                f"no credentials for {protocol}:// are set here ({', '.join(names)}, {_CREDENTIAL_FILES[protocol]})",
                "Leave it so where the store is public, or this machine has a role",
            )


_LOOKS = (_data, _maps, _devices, _memory, _shard_cache, _disk, _tokenizer, _evaluation, _rates, _launcher, _secrets)


@dataclass(frozen=True)
class Stage:
    """What one leg of a recipe takes that is still to be done."""

    name: str
    tokens: int
    seconds: float | None
    """None where nothing tells the speed."""
    gpu_hours: float | None
    disk_bytes: int


def stages(
    need: Need, seconds: float | None, tokens: int, flops_per_second: float | None, cores: int | None = None
) -> list[Stage]:
    """The legs of a recipe with what they take, those that have nothing to do left out.

    Args:
        seconds: of training, None where not known.
        tokens: that are to be trained.
        flops_per_second: that one GPU reaches; None where no GPU is named.
        cores: that tokenize; by default this machine's.
    """
    experiment, disk, cores = need.experiment, disk_needs(need), cores or os.cpu_count() or 1
    found = []
    if unmade := need.unmade:
        cpu_hours = (
            sum(size.text_bytes for size in unmade)
            / 1e12
            * _CPU_HOURS_PER_TB.get(experiment.execution.tokenizer_engine, _CPU_HOURS_PER_TB["huggingface"])
        )
        on_disk = disk["token streams"] + disk["shards"]
        found.append(Stage("tokenize", sum(s.tokens for s in unmade), cpu_hours * 3600 / cores, 0.0, on_disk))
    if tokens:
        hours = None if seconds is None else seconds * experiment.launcher.world_size / 3600
        on_disk = sum(disk.get(name, 0) for name in ("milestones", "rotating checkpoints"))
        found.append(Stage("train", tokens, seconds, hours, on_disk))
    scorecards = sum(name.startswith("scorecard/") for name in need.makes)
    if scorecards and experiment.evaluation and (each := _suite_tokens(experiment, need.home)):
        took = None
        if flops_per_second:
            forward = flops_per_token(experiment.model_config_resolved(), experiment.seq_len) / 3
            took = scorecards * each * forward / flops_per_second
        processes = experiment.evaluation.processes
        found.append(Stage("score", scorecards * each, took and took / processes, took and took / 3600, 0))
    return found


def _suite_tokens(experiment: Experiment, home: Home) -> int | None:
    """Tokens that a scorecard reads, about: its files' bytes, with as many rows before each as there are shots. None
    where the files are not on this machine."""
    from openlm_pipeline.evaluation.suite import load_suite
    from openlm_pipeline.evaluation.task_files import located

    try:
        places = [(Path(located(task, home)), shots) for task, shots in load_suite(experiment.evaluation.suite).runs()]
        return int(sum(path.stat().st_size * (1 + shots) for path, shots in places) / _TEXT_PER_TOKEN)
    except (OSError, OpenLMError):  # `_evaluation` says it
        return None
