"""`openlm study`: many small runs as one, and what they say of a large one."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from openlm_pipeline.cli import study_runs
from openlm_pipeline.errors import ConfigError, printable
from openlm_pipeline.units import format_tokens, parse_tokens

if TYPE_CHECKING:
    from openlm_pipeline.studies.results import HoldOut, Interval, StudyFit

study_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Families of small runs that predict a large one: plan, run, fit.",
)
for command in (study_runs.plan, study_runs.run, study_runs.status, study_runs.report):
    study_app.command()(command)


@study_app.command()
def fit(
    study: Annotated[str | None, typer.Argument(help="A study, or recipes with commas between them.")] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="Instead of own runs: exp_data of mlfoundations/scaling, or a .csv or .jsonl with the columns "
            "parameters, tokens, loss, and as you like loss_error, error, seed, name, dataset, model, setting.X.",
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="Only runs on this dataset, such as rpj.")] = None,
    train: Annotated[
        str | None,
        typer.Option(
            help="Runs to fit: all, small (the five of Gadre et al.), or conditions such as parameters<500M,tokens>1B; "
            "default: those of less compute than is predicted."
        ),
    ] = None,
    predict: Annotated[
        str | None, typer.Option(metavar="PARAMETERS:TOKENS", help="The run to predict, such as 1.4B:900B.")
    ] = None,
    law: Annotated[
        Literal["gadre", "hoffmann"], typer.Option(help="L(C, M) of Gadre et al., or L(N, D) of Hoffmann et al.")
    ] = "gadre",
    estimator: Annotated[
        Literal["huber", "gadre"], typer.Option(help="Huber loss on log L, or least squares as Gadre et al. had it.")
    ] = "huber",
    tasks: Annotated[int, typer.Option(help="Of exp_data: tasks in the average error, 17 or 46.")] = 17,
    refits: Annotated[int, typer.Option(help="Behind the 95% intervals.", min=20)] = 200,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page with pictures to this file.")] = None,
) -> None:
    """Fit a scaling law, hold out the largest size, and predict the loss and error of a run.

    The largest size is first predicted from the smaller ones, and that error is printed; without it nothing is
    predicted. A run that has the predicted size and budget is not fitted, and the prediction is compared with it.

    Examples:

    openlm study fit --from exp_data --dataset rpj --train small --predict 1.4B:900B

    openlm study fit --from runs.csv --law hoffmann --html study.html

    openlm study fit demo_ladder

    openlm study fit tiny_1m,tiny_2m,tiny_4m,tiny_8m,tiny_8m_long --json
    """
    from openlm_pipeline.storage.home import Home
    from openlm_pipeline.studies.fitting import fit_study
    from openlm_pipeline.studies.points import study_points
    from openlm_pipeline.studies.published import of_dataset, read_published, select
    from openlm_pipeline.studies.study import is_study, load_study, target_of

    if (study is None) == (source is None):
        raise ConfigError("give a study or recipes, or --from with a folder of results")
    if tasks not in (17, 46):
        raise ConfigError(f"--tasks {tasks}: Gadre et al. average 17 tasks or 46")

    def say(line: str) -> None:
        typer.echo(line, err=True)

    points = read_published(source, tasks=tasks) if source else study_points(study, Home.from_env(), say)
    points = of_dataset(points, dataset)
    target = _target(predict) or (target_of(load_study(study)) if study and is_study(study) else None)
    compute = 6 * target[0] * target[1] if target else None
    chosen = select(points, train or (f"compute<{compute}" if compute else "all"))
    found = fit_study(
        chosen,
        target,
        law=law,
        estimator=estimator,
        error_points=select(points, train, errors=True) if train == "small" else None,
        others=points,
        refits=refits,
        study=study or str(dataset or source.name),
    )
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1, allow_nan=False))
    else:
        _show(found)
    if html:
        from openlm_pipeline.reports.study import study_page
        from openlm_pipeline.storage.files import write_text

        write_text(html, study_page(found.to_json()))
        typer.echo(f"page: {html}", err=as_json)


def _target(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.split(":")
    try:
        parameters, tokens = map(parse_tokens, parts)
    except ValueError as e:
        why = e if len(parts) == 2 else "write PARAMETERS:TOKENS, such as 1.4B:900B"
        raise ConfigError(f"--predict {text}: {why}") from e
    if not parameters or not tokens:
        raise ConfigError(f"--predict {text}: both must be positive")
    return parameters, tokens


def _show(fit: "StudyFit") -> None:
    console = Console(highlight=False, width=max(140, Console().width))
    table = Table("run", "parameters", "tokens", "D/N", "loss", "law", "residual", "", box=None)
    for column in table.columns[1:7]:
        column.justify = "right"
    compared = fit.prediction.measured.name if fit.prediction and fit.prediction.measured else None
    shown = [run for run in fit.runs if run["in_fit"] or run["name"] == compared]
    for run in shown:
        sizes = (format_tokens(run["parameters"], 3), format_tokens(run["tokens"], 3))
        losses = (f"{run['loss']:.4f}", f"{run['fitted']:.4f}", f"{run['residual']:+.2%}")
        mark = "" if run["in_fit"] else "not fitted"
        table.add_row(printable(run["name"]), *sizes, f"{run['tokens_per_parameter']:.3g}", *losses, mark)
    console.print(table)
    if others := len(fit.runs) - len(shown):
        console.print(f"{others} more runs were not fitted; --json and --html show them")
    for line in _lines(fit):
        console.print(printable(line), markup=False, soft_wrap=True)


def _lines(fit: "StudyFit") -> Iterator[str]:
    forms = {"gadre": "E + (a M^h + b M^-h) C^-h", "hoffmann": "E + A / N^alpha + B / D^beta"}
    coefficients = ", ".join(f"{name} {_interval(of, '.4g')}" for name, of in fit.coefficients.items())
    yield f"law: L = {forms[fit.law]}; {coefficients}"
    if fit.noise.seeds is not None:
        yield f"noise: {fit.noise.seeds:.4f} nats between seeds ({fit.noise.num_seeds} runs)"
    if fit.hold_out:
        yield from _checks("held out", "loss", fit.hold_out)
    if of := fit.prediction:
        name = f"{format_tokens(of.parameters, 3)} on {format_tokens(of.tokens, 3)} tokens"
        for what, predicted, measured in (("loss", of.loss, of.measured), ("error", of.error, of.measured_error)):
            if what == "error" and of.error_hold_out:
                yield from _checks("held out", what, of.error_hold_out)
            if predicted:
                against = (
                    f", measured {measured.measured:.5f}, off by {measured.relative_error:+.4%}" if measured else ""
                )
                yield f"predicted {what} of {name}: {_interval(predicted, '.5f')}{against}"
    yield from (f"warning: {warning}" for warning in fit.warnings)


def _checks(what: str, measure: str, of: "HoldOut") -> Iterator[str]:
    for c in of.checks:
        yield (
            f"{what}: {measure} of {format_tokens(c.parameters, 3)} on {format_tokens(c.tokens, 3)} tokens, from "
            f"{of.num_runs} smaller runs {_interval(c.predicted, '.4f')}, measured {c.measured:.4f}, off by "
            f"{c.relative_error:+.2%}"
        )


def _interval(of: "Interval", form: str) -> str:
    return f"{of.value:{form}}" + ("" if of.low is None else f" (95% {of.low:{form}} to {of.high:{form}})")
