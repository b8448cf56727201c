"""What running a recipe would do, without doing it: each artefact fresh, stale or missing, why, and what it takes.

An artefact is judged as its stage judges it, by the identity that it records; what lies below a stale one is stale too.
Touched raw files are hashed, as a run would; nothing else takes long, and nothing is started or changed.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from openlm_pipeline.checkpoints.folders import KEEP_DAMAGED, Checkpoint, verify
from openlm_pipeline.corpus.discovery import discover
from openlm_pipeline.corpus.excluded import read_excluded
from openlm_pipeline.corpus.maps import map_identity
from openlm_pipeline.errors import ConfigError, DataError, MissingInputError, OpenLMError
from openlm_pipeline.experiments import Dataset, DocumentMap, Experiment
from openlm_pipeline.fingerprint import differences, settings_tree
from openlm_pipeline.pipeline.data import located
from openlm_pipeline.pipeline.preflight import Need, Stage, look_ahead, stages
from openlm_pipeline.result import Finding, refusal
from openlm_pipeline.runs.dry_run import describe
from openlm_pipeline.runs.estimates import peak_flops
from openlm_pipeline.runs.folder import RunFolder
from openlm_pipeline.runs.identity import run_identity
from openlm_pipeline.runs.launch import milestone_checkpoints
from openlm_pipeline.runs.parent import parent_identity
from openlm_pipeline.runs.rates import rate_line
from openlm_pipeline.runs.repeats import Content, content_of, overlaps, read_by_parent
from openlm_pipeline.runs.traffic import BETWEEN
from openlm_pipeline.shards.manifest import DOCUMENTS, MANIFEST, read_dataset
from openlm_pipeline.shards.opening import open_dataset, open_extended, published_url
from openlm_pipeline.storage.home import Home
from openlm_pipeline.tokenization.documents import FileTokens, finished, left_out
from openlm_pipeline.tokenization.packing_job import lost_files, shards_identity
from openlm_pipeline.tokenizers.tokenizer import TRAINING_VERSION, TokenizerInfo, read_tokenizer_info
from openlm_pipeline.units import format_bytes, format_seconds, format_tokens

State = Literal["fresh", "stale", "missing"]
REFUSED = "refused"
_OWNERS = {"tokenizer": "the tokenizer", "shards": "the source", "checkpoint": "the recipe"}
_MEASURED_RECORDS = 50
"""How many of the last training records give the speed, which is their median."""


@dataclass(frozen=True)
class Artefact:
    """One thing that a recipe makes."""

    name: str
    """As in the graph: `shards/pile`."""
    state: State
    why: tuple[str, ...] = ()
    """What differs, or what is not there; empty if fresh."""
    consent: str | None = None
    """One of `result.CONSENTS` that making it needs: something would be set aside. `REFUSED` where none helps."""

    @property
    def kind(self) -> str:
        """`shards` of `shards/pile`."""
        return self.name.partition("/")[0]

    def lines(self) -> Iterator[str]:
        """For people."""
        yield f"{self.state:8} {self.name}"
        yield from (f"           {reason}" for reason in self.why)


@dataclass(frozen=True)
class Cost:
    """What training takes that is still to be done."""

    tokens: int
    steps: int
    checkpoint_bytes: int
    """Size of the milestones that are missing."""
    seconds: float | None
    """None where nothing tells the speed."""
    gpu_hours: float | None
    speed: str
    """Where the time comes from."""
    money: float | None
    learning_rate: str
    """From the first step to the last, drawn."""
    communication: str | None
    """What GPUs send to each other, where there are several."""


@dataclass(frozen=True)
class RecipePlan:
    """The plan of a recipe."""

    name: str
    artefacts: tuple[Artefact, ...]
    cost: Cost
    findings: tuple[Finding, ...] = ()
    """What running it needs, and whether it is there."""
    stages: tuple[Stage, ...] = ()
    """What each leg takes that is still to be done."""
    price: float | None = None
    """Of a GPU-hour."""

    @property
    def todo(self) -> tuple[Artefact, ...]:
        return tuple(a for a in self.artefacts if a.state != "fresh")

    def lines(self) -> Iterator[str]:
        """The plan for people."""
        for artefact in self.artefacts:
            yield from artefact.lines()
        cost = self.cost
        if not self.todo:
            yield "nothing to do"
        yield from (finding.line() for finding in self.findings)
        yield from self._stage_lines()
        if not cost.tokens:
            return
        yield (
            f"to train: {format_tokens(cost.tokens, 4)} tokens, {cost.steps:,} steps; "
            f"{format_bytes(cost.checkpoint_bytes)} of milestones"
        )
        if cost.seconds is None:
            yield f"time: {cost.speed}"
        else:
            money = f", {cost.money:,.2f} at the price given" if cost.money is not None else ""
            yield f"time: {format_seconds(cost.seconds)}, {cost.gpu_hours:,.4g} GPU-hours{money} ({cost.speed})"
        yield cost.learning_rate
        if cost.communication:
            yield cost.communication

    def _stage_lines(self) -> Iterator[str]:
        """A row for each leg, and their sum; a dash where it is not known."""
        if not self.stages:
            return
        yield f"{'stage':9}{'tokens':>9}{'time':>17}{'GPU-hours':>12}{'disk':>10}{'money':>14}"
        known = [s for s in self.stages if s.seconds is not None]
        total = Stage(
            "all" if len(known) == len(self.stages) else "what is known",
            0,
            sum(s.seconds for s in known),
            sum(s.gpu_hours for s in known),
            sum(s.disk_bytes for s in self.stages),
        )
        for stage in (*self.stages, total):
            is_known = stage.seconds is not None
            tokens = format_tokens(stage.tokens, 3) if stage.tokens else ""
            time = format_seconds(stage.seconds) if is_known else "-"
            hours = f"{stage.gpu_hours:,.4g}" if is_known else "-"
            money = f"{stage.gpu_hours * self.price:,.2f}" if is_known and self.price is not None else "-"
            disk = format_bytes(stage.disk_bytes) if stage.disk_bytes else "-"
            yield f"{stage.name:9}{tokens:>9}{time:>17}{hours:>12}{disk:>10}{money:>14}"


def plan(
    experiment: Experiment,
    home: Home,
    *,
    device: str | None = None,
    mfu: float = 0.4,
    price: float | None = None,
    bandwidth: float = BETWEEN,
) -> RecipePlan:
    """What running a recipe would do now.

    Args:
        device: a GPU such as `H100`, for the time where the run has no measured speed yet.
        mfu: share of the device's peak that is reached.
        price: of an hour of one GPU (or process), in any currency.
        bandwidth: bytes per second that a GPU sends to other machines.

    Raises:
        ConfigError: the device is not known.
    """
    artefacts, start, contents = _made(experiment, home)
    checkpoints = [a for a in artefacts if a.kind == "checkpoint"]
    training = {f"shards/{d.name}" for d in experiment.training_datasets()}
    same_run = all(a.state == "fresh" for a in artefacts if a.name in training)
    refused = _findings(experiment, home, artefacts, contents)
    artefacts += _scorecards(experiment, home, {a.name: a for a in checkpoints})
    need = _need(experiment, home, artefacts, device)
    findings = (*refused, *look_ahead(need))
    stale = [a.name for a in artefacts if a.name.startswith(("scorecard/", "checkpoint/")) and a.state != "fresh"]
    there = (home.report(experiment.name, experiment.version) / "report.html").exists()
    state: State = "missing" if not there else "stale" if stale else "fresh"
    why = () if state == "fresh" else (f"{stale[0]} is not fresh",) if stale else ("it was not made yet",)
    artefacts.append(Artefact(f"report/{experiment.name}", state, why))
    missing = sum(a.state != "fresh" for a in checkpoints)
    cost = _cost(experiment, home, start, missing, same_run, device, mfu, price, bandwidth)
    peak = device and peak_flops(device, experiment.training.precision)
    legs = stages(need, cost.seconds, cost.tokens, peak * mfu if peak else None)
    return RecipePlan(experiment.name, tuple(artefacts), cost, findings, tuple(legs), price)


def look(experiment: Experiment, home: Home, only: Collection[str]) -> tuple[list[Artefact], list[Finding]]:
    """The part of a plan that says what is to be made, up to the milestones, and what that needs a consent for.

    Args:
        only: names of the artefacts that are to be made, of which alone something is said.
    """
    artefacts, _, contents = _made(experiment, home)
    wanted = [a for a in artefacts if a.name.replace("raw_files/", "shards/") in only]
    scored = [f"scorecard/{experiment.name}/{label}" for label, _ in experiment.labelled_milestones()]
    wanted += [Artefact(name, "missing") for name in scored if name in only]
    findings = [*_findings(experiment, home, wanted, contents), *look_ahead(_need(experiment, home, wanted))]
    return [a for a in wanted if a.state != "fresh" and a.kind != "scorecard"], findings


def _need(experiment: Experiment, home: Home, artefacts: list[Artefact], device: str | None = None) -> Need:
    makes = frozenset(a.name for a in artefacts if a.state != "fresh")
    untrained = [t for label, t in experiment.labelled_milestones() if f"checkpoint/{experiment.name}/{label}" in makes]
    return Need(experiment, home, makes, (untrained or experiment.milestones)[-1], device)


def _made(experiment: Experiment, home: Home) -> tuple[list[Artefact], int, dict[str, Content]]:
    """Tokenizer, datasets and milestones; the tokens of the checkpoint that training would continue from; and what
    each dataset holds."""
    tokenizer, tokenizer_artefact = _tokenizer(experiment, home)
    artefacts = [tokenizer_artefact]
    contents: dict[str, Content] = {}
    for dataset in experiment.datasets():
        artefacts += _dataset(dataset, home, tokenizer, tokenizer_artefact, contents)
    training = {f"shards/{d.name}" for d in experiment.training_datasets()}
    upstream = [a for a in artefacts if a.name in training and a.state != "fresh"]
    checkpoints, start = _checkpoints(experiment, home, upstream)
    return artefacts + checkpoints, start, contents


def _findings(
    experiment: Experiment, home: Home, artefacts: list[Artefact], contents: dict[str, Content]
) -> list[Finding]:
    """A refusal for each artefact that would be set aside, the milestones of a run as one; what is read twice.

    Args:
        contents: of each dataset.
    """
    told: set[tuple[str, ...]] = set()
    found: list[Finding] = []
    for artefact in artefacts:
        kind, name = artefact.kind, artefact.name.partition("/")[2]
        if artefact.consent is None or (kind, *artefact.why) in told:
            continue
        told.add((kind, *artefact.why))
        what = f"the run {name.rpartition('/')[0]}" if kind == "checkpoint" else artefact.name
        if artefact.consent in (REFUSED, "extend"):  # whose text names the ways on
            consent = None if artefact.consent == REFUSED else artefact.consent
            found.append(Finding("refusal", "\n  ".join(artefact.why), consent=consent))
            continue
        if artefact.consent == "supersede":
            keep = f"To keep it, give {_OWNERS[kind]} another `version` or name"
            what = "\n  ".join([f"{what} was made from something else:", *artefact.why])
        else:
            keep, what = KEEP_DAMAGED, f"{artefact.name} is damaged: {artefact.why[0]}"
        found.append(refusal(artefact.consent, what, keep))
    if any(a.kind == "checkpoint" and a.state != "fresh" for a in artefacts):
        found += [*overlaps(experiment, contents), *read_by_parent(experiment, home, contents)]
    return found


def _tokenizer(experiment: Experiment, home: Home) -> tuple[TokenizerInfo | None, Artefact]:
    spec = experiment.tokenizer
    name = f"tokenizer/{spec.name}"
    try:
        info = read_tokenizer_info(home.tokenizer(spec.name))
    except MissingInputError:
        return None, Artefact(name, "missing", ("it was not made yet",))
    except DataError as e:
        return None, Artefact(name, "stale", (str(e),))
    recorded = {key: value for key, value in info.identity.items() if key != "corpus"}  # hashing it all would take long
    made_from = (
        {"train": settings_tree(spec.train), "code": TRAINING_VERSION} if spec.train else {"source": spec.source}
    )
    changed = differences(recorded, {**made_from, **spec.ends()})
    if changed:
        return info, Artefact(name, "stale", tuple(changed), "supersede")
    return info, Artefact(name, "fresh")


def _dataset(
    dataset: Dataset, home: Home, tokenizer: TokenizerInfo | None, above: Artefact, contents: dict[str, Content]
) -> Iterator[Artefact]:
    name = f"shards/{dataset.name}"
    if dataset.source.shards:
        contents[dataset.name] = content_of(dataset, home, [])
        try:
            open_dataset(dataset, home)
        except OpenLMError as e:
            yield Artefact(name, "missing", (str(e),))
        else:
            yield Artefact(name, "fresh")
        return
    folder = home.shards(dataset.name, dataset.version)
    there = (folder / MANIFEST).exists()
    try:
        raw_files = discover(dataset, home)
    except MissingInputError as e:
        refused = REFUSED if dataset.source.origin == "files" else None  # the embedded corpus is made by the run
        yield Artefact(f"raw_files/{dataset.name}", "missing", (str(e),), refused)
        yield Artefact(name, "stale" if there else "missing", ("its raw files are missing",))
        return
    contents[dataset.name] = content_of(dataset, home, raw_files)
    if tokenizer is None or above.state != "fresh":
        state: State = "stale" if there else "missing"
        yield Artefact(name, state, (f"{above.name} is {above.state}",), above.consent if there else None)
        return
    tokenized, dataset = home.tokenized(dataset.name, dataset.version), located(dataset, home)
    if (place := dataset.source.exclude) and (problem := _unreadable(place)):
        yield Artefact(name, "stale" if there else "missing", (problem,), REFUSED)
        return
    if (spec := dataset.source.map) and (unknown := _unknown(spec)):
        if there:  # whoever trains on the shards need not have the code that its documents went through
            yield Artefact(name, "fresh", (f"as far as can be told here: {unknown}",))
        else:
            yield Artefact(name, "missing", (unknown,), REFUSED)
        return
    try:
        before = open_extended(dataset, home)
    except OpenLMError as e:
        yield Artefact(name, "stale" if there else "missing", (str(e),), REFUSED)
        return
    if before:
        raw_files = [raw for raw in raw_files if raw.name not in before.info["inputs"]]
    done: list[FileTokens] = []
    too_bad: list[str] = []
    skipped = left_out(dataset, raw_files, tokenizer, tokenized)
    raw_files = [raw for raw in raw_files if raw.name not in skipped]
    for raw in raw_files:
        try:
            if result := finished(dataset, raw, tokenizer, tokenized):
                done.append(result)
        except DataError as e:
            too_bad.append(str(e))
    contents[dataset.name] |= {file.version: file.name for file in done}
    if too_bad:
        yield Artefact(f"tokenized/{dataset.name}", "stale", tuple(too_bad))
    elif len(done) < len(raw_files):
        names = {f.name for f in done}
        todo = [raw.name for raw in raw_files if raw.name not in names]
        shown = ", ".join(todo[:3]) + (", ..." if len(todo) > 3 else "")
        why = f"{len(todo)} of {len(raw_files)} raw files are new, changed or not tokenized: {shown}"
        yield Artefact(f"tokenized/{dataset.name}", "stale" if done else "missing", (why,))
    else:
        yield Artefact(f"tokenized/{dataset.name}", "fresh")
    if not there:
        yield Artefact(name, "missing", ("they were not made yet",))
        return
    try:
        entries, info, _ = read_dataset(folder)
    except (DataError, MissingInputError) as e:
        yield Artefact(name, "stale", (str(e),))
        return
    if len(done) < len(raw_files):
        names = {f.name for f in done}
        # A stream that is gone may be made again just as it was; one that is there is of something else.
        others = [r.name for r in raw_files if r.name not in names and (tokenized / f"{r.name}.json").exists()]
        other_files = {r.name for r in raw_files} != set(info["identity"]["files"])
        consent = "supersede" if others or other_files else None
        yield Artefact(name, "stale", (f"tokenized/{dataset.name} is not fresh",), consent)
        return
    changed = differences(info["identity"], shards_identity(dataset, done, tokenizer, before and before.version))
    lost, index_gone = ({}, False) if changed or published_url(dataset) else lost_files(folder, entries)
    if lost or index_gone:
        shown = ", ".join(entry.tar for entry in list(lost.values())[:3]) + (", ..." if len(lost) > 3 else "")
        why = f"{len(lost)} shards are missing or not whole, and alone are made again: {shown}"
        yield Artefact(name, "stale", (why if lost else f"{DOCUMENTS} is missing, and alone is made again",))
        return
    yield Artefact(name, "stale", tuple(changed), "supersede") if changed else Artefact(name, "fresh")


def _unreadable(place: str) -> str | None:
    """Why a list of records to leave out can't be read."""
    try:
        read_excluded(place)
    except OpenLMError as e:
        return str(e)
    return None


def _unknown(spec: DocumentMap) -> str | None:
    """Why the code of a map can't be compared with that which made a dataset."""
    try:
        map_identity(spec)
    except ConfigError as e:
        return str(e)
    return None


def _checkpoints(experiment: Experiment, home: Home, upstream: list[Artefact]) -> tuple[list[Artefact], int]:
    """The milestones, and the tokens of the newest checkpoint that training would continue from."""
    run = RunFolder(home.run(experiment.name, experiment.version))
    labels = [label for label, _ in experiment.labelled_milestones()]
    names = {label: f"checkpoint/{experiment.name}/{label}" for label in labels}
    exists = (run.path / "run.json").exists()
    start = experiment.start_tokens()
    why = [f"{a.name} is {a.state}" for a in upstream]
    began, refused = None, None
    try:
        began = parent_identity(experiment, home)
    except OpenLMError as e:
        why.append(str(e))
        refused = REFUSED if isinstance(e, ConfigError) else None
    begun = exists and run.has_begun
    if why:
        consent = refused or ("supersede" if begun and any(a.consent for a in upstream) else None)
        state: State = "stale" if exists else "missing"
        return [Artefact(name, state, tuple(why), consent) for name in names.values()], start
    if not exists:
        return [Artefact(name, "missing", ("it was not trained yet",)) for name in names.values()], start
    versions = {d.name: open_dataset(d, home).version for d in experiment.training_datasets()}
    identity = run_identity(experiment, versions, began)
    if refusal := run.extension_refusal(experiment, identity):
        return [Artefact(name, "stale", tuple(refusal.splitlines()), "extend") for name in names.values()], start
    if changed := run.differences(identity):
        consent = "supersede" if begun else None
        return [Artefact(name, "stale", tuple(changed), consent) for name in names.values()], start
    there = milestone_checkpoints(experiment, run)
    newest = max((c.tokens for c in run.saved()), default=start)
    return [_milestone(names[label], there.get(label)) for label in labels], newest


def _milestone(name: str, checkpoint: Checkpoint | None) -> Artefact:
    if checkpoint is None:
        return Artefact(name, "missing", ("not trained yet",))
    try:
        verify(checkpoint, hashes=False)
    except DataError as e:
        return Artefact(name, "stale", (str(e),), "remake")
    return Artefact(name, "fresh")


def _scorecards(experiment: Experiment, home: Home, checkpoints: dict[str, Artefact]) -> Iterator[Artefact]:
    if experiment.evaluation is None:
        return
    from openlm_pipeline.pipeline.evaluation import milestones_and_scores

    why: dict[str, list[str]] = {}
    if any(a.state == "fresh" for a in checkpoints.values()):
        why = {label: changed for label, _, changed in milestones_and_scores(experiment, home)}
    for label, _ in experiment.labelled_milestones():
        name = f"scorecard/{experiment.name}/{label}"
        above = checkpoints[f"checkpoint/{experiment.name}/{label}"]
        there = (home.scorecard(experiment.name, experiment.version, label) / "scorecard.json").exists()
        if above.state != "fresh":
            yield Artefact(name, "stale" if there else "missing", (f"{above.name} is {above.state}",))
        elif why.get(label) == []:
            yield Artefact(name, "fresh")
        else:
            yield Artefact(name, "stale" if there else "missing", tuple(why.get(label) or ["not scored yet"]))


def _cost(
    experiment: Experiment,
    home: Home,
    start: int,
    missing: int,
    same_run: bool,
    device: str | None,
    mfu: float,
    price: float | None,
    bandwidth: float,
) -> Cost:
    processes = experiment.launcher.world_size
    whole = describe(experiment, processes, device, mfu, home, bandwidth=bandwidth)
    tokens = max(0, whole.tokens - (start - experiment.start_tokens())) if missing else 0
    seconds, speed = None, "not known: the run has no records yet, and no GPU is named (--gpu)"
    run = RunFolder(home.run(experiment.name, experiment.version))
    records = [r for r in run.last_records() if r.get("tokens_per_second")][-_MEASURED_RECORDS:] if same_run else []
    if whole.seconds is not None:
        seconds, speed = whole.seconds * tokens / whole.tokens, f"assumed: {mfu:.0%} MFU on {whole.device_name}"
    elif records:
        rates = sorted(r["tokens_per_second"] for r in records)
        rate = rates[len(rates) // 2]
        seconds, speed = tokens / rate, f"measured: {rate:,.0f} tokens/s in this run"
    hours = None if seconds is None else seconds * processes / 3600
    return Cost(
        tokens=tokens,
        steps=-(-tokens // experiment.training.global_batch),
        checkpoint_bytes=missing * whole.checkpoint_bytes,
        seconds=seconds,
        gpu_hours=hours,
        speed=speed,
        money=None if hours is None or price is None else hours * price,
        learning_rate=rate_line(experiment),
        communication=whole.traffic_line() if processes > 1 else None,
    )
