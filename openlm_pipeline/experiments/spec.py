"""The experiment: one frozen, typed description from raw text to scorecards.

Fields either change results (they enter an identity, see `openlm_pipeline/fingerprint.py`) or say how and where to run
(`Execution`, `Launcher`), which never does.
"""

import re
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, StringConstraints, create_model, field_validator, model_validator

from openlm_pipeline.errors import ConfigError
from openlm_pipeline.fingerprint import Neutral
from openlm_pipeline.models.config import ModelConfig, resolve_model
from openlm_pipeline.registry import (
    LAUNCHERS,
    OPTIMIZERS,
    SCHEDULES,
    EngineName,
    LauncherName,
    OptimizerName,
    SamplingName,
    ScheduleName,
)
from openlm_pipeline.strict import Strict
from openlm_pipeline.units import Tokens, format_tokens, milestone_label

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_]*$")]
"""Lower-case letters, digits and underscores: a name is used in paths, asset keys and job names."""
Version = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""A folder's name, too."""


_AVERAGE = re.compile(r"(ema|poly)_(\d*\.?\d+)(?:_(\d+))?")


def parse_average(spec: str) -> tuple[str, float, int]:
    """`ema_0.999_10` -> ("ema", 0.999, 10): method, its parameter, and steps between updates (1 if not given).

    Raises:
        ValueError: another form, or a parameter out of range.
    """
    match = _AVERAGE.fullmatch(spec)
    method, parameter, every = match.groups(default="1") if match else ("", "0", "0")
    if int(every) < 1 or (method == "ema" and not 0 <= float(parameter) < 1):
        raise ValueError(
            f"averages: {spec!r} is neither ema_GAMMA_EVERY, with 0 <= GAMMA < 1, nor poly_ETA_EVERY; EVERY is a "
            "number of steps of 1 or more"
        )
    return method, float(parameter), int(every)


class TrainedTokenizer(Strict):
    """A byte-level BPE made from this experiment's first source."""

    vocab_size: int = Field(ge=260)
    """Number of ids, the special tokens included."""


class TokenizerSpec(Strict):
    """Which tokenizer: exactly one of `source` and `train`."""

    name: Name
    source: str | None = None
    """Path of a `tokenizer.json`, of a folder that holds one, or a Hugging Face hub name."""
    train: TrainedTokenizer | None = None
    eot: str = "<|endoftext|>"
    """The token that ends each document."""
    bos: Annotated[str | None, Neutral(None)] = None
    """A token that begins each document, such as `<s>`; by default there is none."""

    def ends(self) -> dict[str, str]:
        """The tokens at a document's ends, as identities hold them."""
        return {"eot": self.eot, **({"bos": self.bos} if self.bos is not None else {})}

    @model_validator(mode="after")
    def _one_origin(self) -> "TokenizerSpec":
        if (self.source is None) == (self.train is None):
            raise ValueError("give exactly one of 'source' (an existing tokenizer) and 'train' (make one)")
        return self


class DocumentMap(Strict):
    """A function of yours that each document of a source goes through; it runs where `OPENLM_MAP_MODULES` names its
    module. It gets an `openlm_pipeline.corpus.maps.Document` and the `arguments`, and returns the text, or None or a
    `Drop` for a document that is to be left out."""

    function: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")]
    """`module:function`."""
    version: str
    """Raised by you when it would give something else, though its module's file is the same: other data, say."""
    arguments: dict[str, Any] = {}
    fields: tuple[str, ...] = ()
    """Fields or columns that it gets beside the text, such as `meta.pile_set_name`."""


class Source(Strict):
    """Raw text files that become one dataset of shards, or shards that are there already: `files` or `shards`."""

    name: Name
    version: Version = "v1"
    files: tuple[str, ...] = ()
    """Paths, globs and folders, here (relative ones start at `OPENLM_HOME`) or at any fsspec URL; `@PATH` is a file
    that lists such, one per line."""
    shards: str | None = None
    """Folder or fsspec URL of ready-made shards: this project's, or OpenLM's with a `manifest.jsonl`; also a manifest
    file, a list of tars (`shard-{0000..0099}.tar`, `a.tar::b.tar`), or `synthetic://SAMPLES/SEED`."""
    origin: Literal["files", "embedded"] = "files"
    """`embedded`: the corpus that this project makes from the Python installation it runs in."""
    extends: Annotated[Version | None, Neutral(None)] = None
    """A version of this source that is made: its shards stay, and only the raw files that it lacks are packed."""
    max_tokens: Annotated[Tokens | None, Field(gt=0), Neutral(None)] = None
    """Only so many tokens are read: the first samples, which are of documents in random order. Nothing is copied."""
    weight: float = Field(default=1.0, gt=0)
    """Share of this source in the mixture, relative to the other sources."""
    text_key: str = "text"
    """Field or column of the text; `meta.text` is the field `text` in the field `meta`."""
    format: Annotated[str | None, Neutral(None)] = None
    """Suffix as which all files are read, such as `.jsonl`, where their names say nothing or something else."""
    on_bad_file: Annotated[Literal["fail", "skip"], Neutral("fail")] = "fail"
    """`skip`: leave out a file that is damaged or has too many bad records; such files are counted and named."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Share of bad records above which a file fails instead of being quarantined record by record; so does one of whose
    bytes ten times that share are in bad records."""
    special_tokens: Annotated[Literal["ids", "text"], Neutral("ids")] = "ids"
    """What the string of a special token, such as `<|endoftext|>`, becomes where it stands in a document: that token's
    id, or with `text` the ids of its letters."""
    map: Annotated[DocumentMap | None, Neutral(None)] = None
    """Keeps, changes or drops each document; what it drops is counted by reason."""
    exclude: Annotated[str | None, Field(min_length=1), Neutral(None)] = None
    """List of records that are left out, counted by reason: a file (a relative path starts at `OPENLM_HOME`) or URL of
    JSON lines, as `openlm contamination RECIPE --remove FILE` writes it."""
    breakdown: Annotated[str | None, Neutral(None)] = None
    """Field or column, such as `meta.pile_set_name`, by whose values documents, bytes and tokens are counted."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        if bool(self.files) == bool(self.shards):
            raise ValueError("give exactly one of 'files' (raw text) and 'shards' (ready-made ones)")
        if self.exclude and self.shards:
            raise ValueError("'exclude' leaves records of 'files' out; ready-made shards are what they are")
        if self.extends and (self.shards or self.extends == self.version):
            raise ValueError("'extends' names another version of a source with 'files'")
        return self


class Dataset(Strict):
    """One source with the settings that make it shards. Derived from an experiment."""

    source: Source
    tokenizer: TokenizerSpec
    seq_len: int
    samples_per_shard: int
    shuffle_seed: int
    pad_id: int | None = None
    vocab_size: int | None = None
    """The model's: OpenLM's readers take negative ids modulo it."""
    shards_url: str | None = None
    keep_local_shards: bool = True
    shard_cache_bytes: int | None = None
    engine: EngineName = "auto"
    verify_every: int = 500

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def version(self) -> str:
        return self.source.version


class Validation(Strict):
    """Held-out text on which each milestone's loss is measured: one `source`, or several `sources`."""

    source: Source | None = None
    sources: tuple[Source, ...] = ()
    """Each has its own loss; the first one's is the loss of scorecards and reports."""
    every: Annotated[Tokens, Field(ge=1)] | None = None
    """Tokens between validations; by default only milestones are validated."""
    intervals: bool = False
    """Also give a 95% bootstrap interval over samples."""
    max_samples: int = Field(default=512, ge=1)
    """At most this many samples of `seq_len` tokens of a source, the first ones in shard order."""

    @property
    def held_out(self) -> tuple[Source, ...]:
        """The sources, however they were given."""
        return (self.source,) if self.source else self.sources

    @model_validator(mode="after")
    def _some(self) -> "Validation":
        if bool(self.source) == bool(self.sources):
            raise ValueError("give exactly one of 'source' and 'sources'")
        return self


class Training(Strict):
    """Optimisation: everything here changes the weights."""

    global_batch: Annotated[Tokens, Field(ge=1)]
    """Tokens per step over all processes; a multiple of seq_len."""
    lr: float = Field(gt=0)
    lr_min: float = Field(default=0.0, ge=0)
    """Floor of the cosine and of the decay of WSD."""
    schedule: ScheduleName = "cosine"
    schedule_settings: dict[str, Any] = {}
    """Settings of the schedule's own, for one that has some."""
    warmup: Tokens = 0
    """Tokens of linear warm-up from zero."""
    decay: Tokens = 0
    """Tokens of the final decay of the `wsd` schedule."""
    decay_power: float = Field(default=1.0, gt=0)
    """1 is a linear decay; OpenLM's cooldown is (steps left / decay steps) to this power."""
    lr_floor: float = Field(default=0.0, ge=0)
    """No step after the warm-up has less (OpenLM's `--force-min-lr`)."""
    horizon: Tokens | None = None
    """Tokens at which the schedule ends; by default the last milestone. `constant` has none."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled; applied to every parameter, norms and embeddings included, as OpenLM does."""
    no_decay: tuple[Literal["norms", "embeddings"], ...] = ()
    """Parameters without weight decay: gains and biases of norms; the embedding and the output matrix."""
    optimizer: OptimizerName = "adamw"
    """`muon`: orthogonalised momentum for the matrices inside the blocks, AdamW for the rest."""
    optimizer_settings: dict[str, Any] = {}
    """Settings of the optimizer's own, for one that has some."""
    state_precision: Literal["fp32", "bf16"] = "fp32"
    """Type of the weights between steps and of the optimizer's state; `bf16` halves memory, at a loss of precision."""
    grad_clip: float | None = Field(default=1.0, gt=0)
    """Largest global L2 norm of the gradient."""
    z_loss: float = Field(default=0.0, ge=0)
    """Coefficient of the mean squared log-partition."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: parameters are cast to bfloat16 for compute, gradients are reduced in fp32."""
    float8: bool = False
    """Matrix products of the blocks in float8 with one scale a tensor (torchao; H100 and later)."""
    document_mask: bool = False
    """Attention within a document only: tokens do not see what stands before the last end-of-text."""
    mask_left: int | None = Field(default=None, ge=0)
    """Token id: targets up to and including its last place in a sample count for nothing (`--target-mask-left`)."""
    squash_mask_left: bool = False
    """Also take the `mask_left` tokens out of the sample, and fill it up with `mask_token` (`--squash-mask-left`)."""
    mask_token: int | None = Field(default=None, ge=0)
    """Token id that is never a target, such as a padding token (`--target-mask-individual`)."""
    averages: tuple[str, ...] = ()
    """Averages of the weights that are kept and saved beside them: `ema_GAMMA_EVERY`, `poly_ETA_EVERY` (OpenLM's
    `--averagers`), such as `ema_0.999_10`."""
    max_skipped_steps: int = Field(default=0, ge=0)
    """Steps whose loss or gradient is not finite, or spikes, that may be left out in a row before training stops."""
    skip_steps: tuple[Annotated[int, Field(ge=1)], ...] = ()
    """Steps to leave out, such as one whose data are broken: their samples are used up, and the weights stay."""
    spike_factor: float | None = Field(default=None, gt=1)
    """A gradient norm of so many times its running mean is a spike."""
    sampling: SamplingName = "permutation"
    """Order of the samples. `permutation`: each once per epoch, shuffled over the whole source. `windowed`: each
    once per epoch, shuffled within `window_shards` shards at a time, for remote shards. `resampled` and `manifest`:
    OpenLM's."""
    window_shards: int = Field(default=64, ge=1)
    """Shards whose samples are shuffled together by `windowed`."""
    source_batch: int = Field(default=8, ge=1)
    """Consecutive sequences from one source in `resampled` and `manifest`: OpenLM's batch per GPU."""

    @model_validator(mode="after")
    def _choices_know_their_settings(self) -> "Training":
        for spec in self.averages:
            parse_average(spec)
        SCHEDULES[self.schedule](self)
        OPTIMIZERS[self.optimizer](self)
        return self


class Execution(Strict):
    """How to run training; nothing here changes results."""

    micro_batch: int | None = Field(default=None, ge=1)
    """Sequences a process handles at once, or the largest divisor of its share of the global batch below that; by
    default the whole share."""
    checkpoint_every: Annotated[Tokens, Field(ge=1)] | None = None
    """Tokens between rotating checkpoints; by default only milestones are saved."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Rotating checkpoints kept; milestones are always kept."""
    keep_before_milestone: int = Field(default=0, ge=0)
    """Steps before each milestone at which a checkpoint is made and kept, so that `openlm verify --replay` can train
    the steps between again; 0 keeps none."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """`full`: keep each block's input only; `selective`: keep matrix products and attention, make the rest again."""
    compile: bool = False
    """Compile blocks, final norm, head and loss with torch.compile."""
    loss_chunk: int = Field(default=2048, ge=1)
    """Positions whose logits exist at one time in the loss."""
    replicas: int | None = Field(default=None, ge=1)
    """Groups of processes that each hold all weights (HSDP), or the largest divisor of the processes below that; 1
    shards over all. By default one per machine where micro-batches are too short to hide gathering, else 1."""
    reshard_after_forward: bool = True
    """Give gathered weights back between the forward and backward pass: less memory, more communication."""
    deterministic: bool = False
    """Only operations that give the same bits each time, at some cost."""
    async_save: bool = True
    """Write checkpoints while training continues."""
    upload_to: str | None = None
    """fsspec URL to which finished checkpoints and metrics are copied, such as `s3://bucket/runs`."""
    report_to: tuple[Literal["wandb", "tensorboard"], ...] = ()
    wandb_project: str = "openlm_pipeline"
    profile_steps: tuple[int, int] | None = None
    """First and last step of which a trace is written to the run's `profile/`."""
    hang_seconds: float | None = Field(default=None, gt=0)
    """A step of this length counts as a hang: stacks and NCCL's flight record are written, and the process ends."""
    prefetch_batches: int = Field(default=2, ge=1)
    """Batches read ahead of training."""
    log_every: int = Field(default=10, ge=1)
    """Steps between two records of `metrics.jsonl`."""
    shards_url: str | None = None
    """fsspec URL to which finished shards are copied, as `URL/source/version`, and from which they are read where they
    are missing, such as `s3://bucket/shards`."""
    keep_local_shards: bool = True
    """Whether shards stay in `OPENLM_HOME` once they are at `shards_url`."""
    shard_cache_bytes: int | None = Field(default=None, ge=1)
    """Most space a dataset's fetched shards may take in `OPENLM_HOME`; the longest unused goes first."""
    tokenizer_engine: EngineName = "auto"
    """`auto` takes the fast engine where it gives the ids of Hugging Face `tokenizers`, which it is checked against."""
    verify_every: int = Field(default=500, ge=1)
    """One in so many documents is encoded by both engines; a difference fails the file."""

    @field_validator("shards_url", mode="before")
    @classmethod
    def _empty_is_none(cls, value: Any) -> Any:
        return value or None

    @model_validator(mode="after")
    def _shards_somewhere(self) -> "Execution":
        if not self.keep_local_shards and self.shards_url is None:
            raise ValueError("keep_local_shards is false, but there is no shards_url to keep them at")
        return self


class Baseline(Strict):
    """A model that is scored with the same suite, to compare a run with."""

    name: Name
    model: str = Field(min_length=1)
    """A Hugging Face folder or hub name, an OpenLM `.pt` file, or a checkpoint folder of a run."""
    revision: str | None = None
    """Branch, tag or commit of a hub name."""
    tokenizer: str | None = None
    """`tokenizer.json`, its folder, or a hub name; by default a Hugging Face model's own, else GPT-NeoX-20B's."""


class WhileTraining(Strict):
    """A part of the suite that is scored beside training, at each milestone, without a rank waiting for it."""

    limit: int = Field(default=100, ge=1)
    """Rows of each task."""
    tasks: tuple[str, ...] = ()
    """Labels; by default all."""
    device: str = "cpu"
    """Such as `cuda:7`, where one is free."""
    threads: int = Field(default=1, ge=1)
    """Of the CPU."""


class Evaluation(Strict):
    """Which tasks score a milestone, and what it is compared with."""

    suite: str
    """Name of a shipped suite or path of a YAML file in LLM Foundry's `icl_tasks` format."""
    backend: Literal["native", "foundry"] = "native"
    """`foundry`: LLM Foundry itself, in the environment that `make foundry` builds."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """What matrix products are computed in; scores of one precision are filed apart from those of another."""
    average: str | None = None
    """One of `training.averages`: score it in place of the last weights."""
    baselines: tuple[Baseline, ...] = ()
    """Models to score too."""
    quoted: tuple[str, ...] = ()
    """Published scores to show beside, such as `pythia_1b`; `openlm baselines` lists them."""
    batch_tokens: int | None = Field(default=None, ge=1)
    """Tokens in one forward pass of the scorer, padding included; by default what suits the device. Execution only."""
    processes: int = Field(default=1, ge=1)
    """Processes that score, one per GPU. Execution only."""
    while_training: Annotated[WhileTraining | None, Neutral(None)] = None
    """By default nothing is scored before `openlm evaluate` or the graph does. Execution only."""

    @model_validator(mode="after")
    def _one_name_each(self) -> "Evaluation":
        names = [b.name for b in self.baselines]
        if len(set(names)) < len(names):
            raise ValueError("two baselines have one name")
        if self.backend == "foundry" and (self.processes > 1 or self.precision != "fp32"):
            raise ValueError("the foundry backend scores in one process and fp32")
        return self


class Parent(Strict):
    """The milestone of another run that a run continues from: a fork. Tokens are counted on from there, and so is the
    order of the samples."""

    run: Name
    version: Version = "v1"
    milestone: Annotated[Tokens, Field(ge=1)]
    optimizer: Literal["keep", "reset"] = "keep"
    """`keep` the optimizer's state, or begin with a new one."""
    schedule: Literal["continue", "restart"] = "continue"
    """`continue` the schedule at the parent's tokens, or `restart` it there: warm-up and all, up to the horizon."""


class Launcher(Strict):
    """Where training runs.

    Each kind has settings of its own at the key of its name, such as `launcher.slurm.time_limit`: the `Settings` of its
    class in `runs/launchers`.
    """

    model_config = ConfigDict(extra="allow")

    kind: LauncherName = "local"
    nodes: int = Field(default=1, ge=1)
    """Machines; each runs `processes`."""
    processes: int = Field(default=1, ge=1)
    """Processes of torchrun per machine, one per GPU."""
    max_restarts: int = Field(default=0, ge=0)
    """Times that torchrun starts all processes again after one of them died."""
    grace_seconds: int = Field(default=300, ge=1)
    """That the trainer has to end its step and save once it is asked to stop: by a cancel, or ahead of a time limit."""

    @classmethod
    def keys(cls) -> list[str]:
        return [*super().keys(), *LAUNCHERS.names]

    @property
    def world_size(self) -> int:
        """Processes in all."""
        return self.nodes * self.processes

    @property
    def settings(self) -> Any:
        """The own settings of this kind."""
        return (self.model_extra or {}).get(self.kind) or LAUNCHERS[self.kind].Settings()

    @model_validator(mode="before")
    @classmethod
    def _settings_of_kinds(cls, data: Any) -> Any:
        """Those of other kinds are checked too: a recipe may have several, to choose from by `launcher.kind=`."""
        if not isinstance(data, dict):
            return data
        kind = data.get("kind", "local")
        checked = dict(data)
        for name, entry in LAUNCHERS:
            value = checked.pop(name, None)
            required = [key for key, field in entry.Settings.model_fields.items() if field.is_required()]
            if value is None and name == kind and required:
                raise ValueError(f"kind {kind!r} needs '{kind}: {{{', '.join(f'{key}: ...' for key in required)}}}'")
            if value is not None or (name == kind and entry.Settings.model_fields):
                own = create_model("Launcher", **{name: (entry.Settings, ...)})  # so that an error has the key's name
                checked[name] = getattr(own.model_validate({name: {} if value is None else value}), name)
        return checked

    @model_validator(mode="after")
    def _fits_its_kind(self) -> "Launcher":
        LAUNCHERS[self.kind].check(self)
        return self


class Experiment(Strict):
    """One experiment. Its runs, scorecards and reports are filed under `name/version`."""

    name: Name
    version: Version = "v1"
    description: str = ""
    study: str | None = None
    """The study that it is a run of: its group in the graph."""
    tokenizer: TokenizerSpec
    seq_len: int = Field(ge=8)
    """Tokens that a sample predicts; a stored sample has one more."""
    sources: tuple[Source, ...] = Field(min_length=1)
    validation: Validation | None = None
    samples_per_shard: int = Field(default=8192, ge=1)
    shuffle_seed: int = 42
    """Seed of the document order within a dataset."""
    pad_id: int | None = Field(default=None, ge=0)
    """Token id that fills up a dataset's last sample, as OpenLM does; by default an incomplete sample is left out."""
    seed: int = Field(default=0, ge=-(2**63), lt=2**64)
    """Seed of the initial weights and of the sample order."""
    model: dict[str, Any]
    """`name` of a known model and any field of its config to override, or all fields of a new one."""
    training: Training
    milestones: tuple[Tokens, ...] = Field(min_length=1)
    """Token counts at which a checkpoint is kept for ever and scored."""
    init_from: str | None = Field(default=None, min_length=1)
    """Weights that the run begins with, in place of drawn ones: a checkpoint of OpenLM, a Hugging Face folder of an
    OpenLM model, Llama or Qwen3, or a run's milestone as `RUN@250B`, or `RUN/VERSION@250B` where that is not v1. Tokens
    and samples begin at 0."""
    parent: Parent | None = None
    """Where a fork begins; by default a run begins at 0 tokens with weights of its own."""
    evaluation: Evaluation | None = None
    execution: Execution = Execution()
    launcher: Launcher = Field(default_factory=Launcher)

    @model_validator(mode="after")
    def _consistent(self) -> "Experiment":
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must increase")
        batch = self.training.global_batch
        if batch % self.seq_len:
            raise ValueError(f"training.global_batch {batch} is not a multiple of seq_len {self.seq_len}")
        if self.milestones[0] < self.start_tokens() + batch:
            after = f" after the parent's {format_tokens(self.start_tokens())}" if self.parent else ""
            raise ValueError(
                f"the first milestone {format_tokens(self.milestones[0])} is less than one global batch{after}"
            )
        if self.parent and self.init_from:
            raise ValueError("a fork has its parent's weights; init_from is for a run of its own")
        if self.parent and (self.parent.run, self.parent.version) == (self.name, self.version):
            raise ValueError("a run cannot be its own parent; give the fork another name or version")
        if len({self.steps(m) for m in self.milestones}) < len(self.milestones):
            raise ValueError(f"two milestones end at the same step; one step is {format_tokens(batch)} tokens")
        names = [d.name for d in self.datasets()]
        if len(names) != len(set(names)):
            raise ValueError("every source, those of validation included, needs its own name")
        if self.tokenizer.train and not self.sources[0].files:
            raise ValueError("the tokenizer is trained on the first source, which needs 'files'")
        average = self.evaluation.average if self.evaluation else None
        if average is not None and average not in self.training.averages:
            raise ValueError(f"evaluation.average {average!r} is not one of training.averages")
        if self.model_config_resolved().seq_len < self.seq_len:
            raise ValueError(f"seq_len {self.seq_len} is more than the model's {self.model_config_resolved().seq_len}")
        vocab_size = self.model_config_resolved().vocab_size
        for name in ("mask_left", "mask_token"):
            if (masked := getattr(self.training, name)) is not None and masked >= vocab_size:
                raise ValueError(f"training.{name} {masked} is no id of the model, which has {vocab_size}")
        horizon = self.schedule_horizon()
        if horizon is not None:
            length = horizon - self.schedule_start()
            if SCHEDULES[self.training.schedule](self.training).shortest() > length:
                raise ValueError(
                    f"warm-up and decay are longer than the schedule ({format_tokens(max(0, length))} tokens)"
                )
        return self

    @property
    def group(self) -> str:
        """Of its assets in the graph."""
        return self.study or self.name

    def model_config_resolved(self) -> ModelConfig:
        """The model's full config; a new model takes `seq_len`, and the vocabulary of a tokenizer made here."""
        settings = dict(self.model)
        if "name" not in settings:
            settings.setdefault("seq_len", self.seq_len)
            if self.tokenizer.train:
                settings.setdefault("vocab_size", self.tokenizer.train.vocab_size)
        return resolve_model(settings)

    def datasets(self) -> list[Dataset]:
        """The mixture's datasets in order, then those of validation."""
        sources = [*self.sources, *(self.validation.held_out if self.validation else ())]
        ready_made = any(s.shards for s in sources)
        return [
            Dataset(
                source=s,
                tokenizer=self.tokenizer,
                seq_len=self.seq_len,
                samples_per_shard=self.samples_per_shard,
                shuffle_seed=self.shuffle_seed,
                pad_id=self.pad_id,
                vocab_size=self.model_config_resolved().vocab_size if ready_made else None,
                shards_url=self.execution.shards_url,
                keep_local_shards=self.execution.keep_local_shards,
                shard_cache_bytes=self.execution.shard_cache_bytes,
                engine=self.execution.tokenizer_engine,
                verify_every=self.execution.verify_every,
            )
            for s in sources
        ]

    def training_datasets(self) -> list[Dataset]:
        return self.datasets()[: len(self.sources)]

    def validation_datasets(self) -> list[Dataset]:
        return self.datasets()[len(self.sources) :]

    def schedule_horizon(self) -> int | None:
        """Tokens at which the learning-rate schedule ends, None for one without an end."""
        if not SCHEDULES[self.training.schedule].has_horizon:
            return None
        return self.training.horizon or self.milestones[-1]

    def start_tokens(self) -> int:
        """Tokens at which training begins: of the parent's milestone, or 0."""
        return self.parent.milestone if self.parent else 0

    def schedule_start(self) -> int:
        """Tokens at which the learning-rate schedule begins."""
        return self.start_tokens() if self.parent and self.parent.schedule == "restart" else 0

    def learning_rates(self, start_tokens: int) -> Callable[[int], float]:
        """The learning rate of the step after so many of the run; a fork's own schedule starts where its parent ended.

        Args:
            start_tokens: of the parent's checkpoint, for a fork.
        """
        start, horizon = 0, self.schedule_horizon()
        if self.schedule_start():
            start = start_tokens // self.training.global_batch
            horizon = horizon and horizon - start_tokens
        schedule = SCHEDULES[self.training.schedule](self.training, horizon)
        return lambda steps: schedule.rate(steps - start)

    def steps(self, tokens: int) -> int:
        """Optimizer steps that reach `tokens`, rounded up."""
        return -(-tokens // self.training.global_batch)

    def limit(self, until: int | None, steps: int | None) -> int:
        """Tokens to train up to, of which at most one is given: tokens or steps; else those of the last milestone.

        Raises:
            ConfigError: both are given, or it is not between the start and the last milestone.
        """
        if until is not None and steps is not None:
            raise ConfigError("--until and --steps say the same in two ways; give one")
        limit = until if steps is None else steps * self.training.global_batch
        if limit is None or self.steps(limit) == self.steps(self.milestones[-1]):
            return self.milestones[-1]
        if not self.start_tokens() < limit < self.milestones[-1]:
            raise ConfigError(
                f"{self.name} trains from {format_tokens(self.start_tokens())} to its last milestone, "
                f"{format_tokens(self.milestones[-1])} tokens: {format_tokens(limit)} is not between; add milestones"
            )
        return limit

    def labelled_milestones(self) -> Iterator[tuple[str, int]]:
        """(`t0250B`, tokens) in order."""
        return ((milestone_label(t), t) for t in self.milestones)
