"""`openlm evaluate`: the milestones of a recipe, or any model with the arguments of OpenLM's eval script."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from openlm_pipeline.errors import ConfigError

_MODEL_OPTIONS = "Options for one model"
_FLAGS = "Options for one OpenLM model whose files do not say what it is"


def evaluate(
    recipe: Annotated[
        str | None, typer.Argument(help="Name of a recipe (`openlm recipes`) or path of a YAML file.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change, such as evaluation.suite=x."),
    ] = None,
    milestone: Annotated[list[str] | None, typer.Option(help="Only this one, such as t0250B or 250B.")] = None,
    baseline: Annotated[list[str] | None, typer.Option(help="Only this of the recipe's baselines.")] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Only these tasks of the suite, such as copa,piqa; filed apart.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only so many rows of each task, the same each time; filed apart.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1 or mps; default: the first GPU, else the CPU.")
    ] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens in one forward pass; default: what suits the device.")
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            help="OpenLM's .pt, a folder step-* of a run, a Hugging Face folder, or a hub name.",
            rich_help_panel=_MODEL_OPTIONS,
        ),
    ] = None,
    eval_yaml: Annotated[
        str, typer.Option(help="A suite's name or YAML file.", rich_help_panel=_MODEL_OPTIONS)
    ] = "openlm",
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="tokenizer.json, its folder, or a hub name; default: the folder's or run's own, OPENLM_TOKENIZER, or "
            "GPT-NeoX-20B's.",
            rich_help_panel=_MODEL_OPTIONS,
        ),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub name.", rich_help_panel=_MODEL_OPTIONS)
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(help="What to file the scores under; default: made of the path.", rich_help_panel=_MODEL_OPTIONS),
    ] = None,
    output_dir: Annotated[
        Path | None,
        typer.Option(help="Default: OPENLM_HOME/scorecards/models/NAME/SUITE.", rich_help_panel=_MODEL_OPTIONS),
    ] = None,
    max_seq_len: Annotated[
        int | None,
        typer.Option(min=2, help="Longest sequence, where a task does not say.", rich_help_panel=_MODEL_OPTIONS),
    ] = None,
    backend: Annotated[
        Literal["native", "foundry"],
        typer.Option(help="foundry: LLM Foundry itself (`make foundry`).", rich_help_panel=_MODEL_OPTIONS),
    ] = "native",
    precision: Annotated[
        Literal["fp32", "tf32", "bf16"],
        typer.Option(help="What the model computes in.", rich_help_panel=_MODEL_OPTIONS),
    ] = "fp32",
    model_config: Annotated[Path | None, typer.Option(help="OpenLM's JSON file.", rich_help_panel=_FLAGS)] = None,
    model: Annotated[str | None, typer.Option(help="A name of `openlm models`.", rich_help_panel=_FLAGS)] = None,
    model_norm: Annotated[
        str | None, typer.Option(help="Such as gain_only_lp_layer_norm.", rich_help_panel=_FLAGS)
    ] = None,
    qk_norm: Annotated[bool | None, typer.Option("--qk-norm/--no-qk-norm", rich_help_panel=_FLAGS)] = None,
    positional_embedding_type: Annotated[
        str | None, typer.Option(help="rotary, llama_rotary, head_rotary or none.", rich_help_panel=_FLAGS)
    ] = None,
    ffn_type: Annotated[str | None, typer.Option(help="swiglu, swiglu_torch or gelu.", rich_help_panel=_FLAGS)] = None,
) -> None:
    """Score a run's milestones and baselines, or one model; tasks that are scored already are reused.

    For a recipe: scorecards with intervals and changes, under OPENLM_HOME/scorecards/RECIPE. For a model: the lines
    `metrics/TASK/K-shot/METRIC: value` of OpenLM, and items.parquet, results.json and scorecard.json in the output
    folder. Several processes: `torchrun --nproc-per-node N -m openlm_pipeline evaluate ...`.

    Examples:

    openlm evaluate demo@400K

    openlm evaluate --checkpoint epoch_64.pt --model open_lm_1b --eval-yaml openlm

    openlm evaluate --checkpoint EleutherAI/pythia-1b --name pythia_1b --tasks copa,piqa --limit 100
    """
    from openlm_pipeline.evaluation.suite import Part
    from openlm_pipeline.pipeline import evaluation as scoring
    from openlm_pipeline.storage.home import Home

    part = Part(tuple(t.strip() for t in (tasks or "").split(",") if t.strip()), limit)
    if device is not None:
        check_device(device)
    if (recipe is None) == (checkpoint is None):
        raise ConfigError("give a recipe, or --checkpoint with a model to score")
    say = scoring.on_first_process(_printer())
    if recipe is not None:
        recipe, at, one = recipe.partition("@")
        milestone = [*(milestone or []), *([one] if at else [])]
        changes = [*(overrides or []), *([f"evaluation.batch_tokens={batch_tokens}"] if batch_tokens else [])]
        _evaluate_recipe(recipe, changes, milestone, baseline, say, {"part": part, "device": device})
        return
    if model is not None and model_config is not None:
        raise ConfigError("--model and --model-config both name the model; give one")
    flags = {
        "model_norm": model_norm,
        "qk_norm": qk_norm,
        "positional_embedding_type": positional_embedding_type,
        "ffn_type": ffn_type,
    }
    scored = scoring.score_model(
        checkpoint,
        eval_yaml,
        Home.from_env(),
        say,
        name=name,
        out_dir=output_dir,
        model=model or (str(model_config) if model_config else None),
        flags={key: value for key, value in flags.items() if value is not None},
        tokenizer=tokenizer,
        revision=revision,
        max_seq_len=max_seq_len,
        backend=backend,
        precision=precision,
        batch_tokens=batch_tokens,
        part=part,
        device=device,
    )
    say(f"Ran eval in: {scored.facts['seconds']:.1f} seconds")
    for metric, value in scored.facts["metrics"].items():
        say(f"{metric}: {value}")
    say(f"scores: {scored.path}")


def check_device(name: str) -> None:
    """
    Raises:
        ConfigError: there is no such device here.
    """
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as e:
        raise ConfigError(f"--device {name}: {str(e).splitlines()[0]}") from e


def _printer():
    console = Console(highlight=False, soft_wrap=True)
    return lambda line: console.print(line, markup=False)


def _evaluate_recipe(
    recipe: str, overrides: list[str], milestone: list[str] | None, baseline: list[str] | None, say, how: dict
) -> None:
    from openlm_pipeline.experiments import load_experiment
    from openlm_pipeline.pipeline import evaluation as scoring
    from openlm_pipeline.pipeline import training as stages
    from openlm_pipeline.pipeline.items import milestone_named
    from openlm_pipeline.runs.launch import milestone_checkpoints, passed_over
    from openlm_pipeline.storage.home import Home

    experiment, home = load_experiment(recipe, overrides), Home.from_env()
    labels = [milestone_named(experiment, m) for m in milestone or []]
    known = [b.name for b in experiment.evaluation.baselines] if experiment.evaluation else []
    if unknown := [b for b in baseline or [] if b not in known]:
        raise ConfigError(f"recipe {experiment.name} has no baseline {unknown[0]}; it has {', '.join(known) or 'none'}")
    if not labels and not baseline:
        run = stages.open_run(experiment, home)
        there = [*milestone_checkpoints(experiment, run), *passed_over(experiment, run)]  # the latter are errors
        labels = there or [next(experiment.labelled_milestones())[0]]
    for wanted in baseline or ([] if milestone else known):
        say(f"scorecard: {scoring.score_baseline(experiment, home, wanted, say, **how).path}")
    for label in labels:
        say(f"scorecard: {scoring.score(experiment, home, label, say, **how).path}")
