"""A study as one self-contained HTML page: its law against its runs, what it predicts, sweeps, noise and runs.

It is made from the JSON of a fit (`openlm study fit --json`), so that a page can be made of one that was kept.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from openlm_pipeline.reports.plots import name_ends
from openlm_pipeline.reports.render import html_page
from openlm_pipeline.reports.svg import ACCENT, INK, MUTED, RULE, SECOND, drawing_style, inline_svg
from openlm_pipeline.units import format_tokens

Found = Mapping[str, Any]
_WIDTH_INCHES = 9.6


def study_page(found: Found) -> str:
    """The page of a fit, given as its JSON."""
    sweeps = [(name, Markup(_sweep_chart(cells, name)), _sweep_table(cells, name)) for name, cells in _sweeps(found)]
    return html_page(
        "study.html",
        found=found,
        headline=_headline(found),
        figures=_figures(found),
        loss=Markup(_loss_chart(found)),
        residuals=Markup(_residual_chart(found)),
        checks=_checks(found),
        coefficients=[
            (name, f"{of['value']:.4g}", _ends(of, ".4g"))
            for name, of in [*found["coefficients"].items(), *found["error_coefficients"].items()]
        ],
        envelope=_envelope(found),
        sweeps=sweeps,
        optima=[_optimum(of) for of in found["optima"]],
        runs=_runs(found),
        form={"gadre": "L = E + (a Mʰ + b M⁻ʰ) C⁻ʰ", "hoffmann": "L = E + A/N^α + B/D^β"}[found["law"]],
    )


def _size(at: Found) -> str:
    return f"{format_tokens(at['parameters'], 3)} on {format_tokens(at['tokens'], 3)} tokens"


def _ends(of: Found, form: str) -> str:
    if of["low"] is None:
        return "–"
    low, high = (0.0 if abs(end) < 1e-4 else end for end in (of["low"], of["high"]))
    return f"{low:{form}} to {high:{form}}".replace("-", "−")


def _percent(share: float) -> str:
    return f"{share:+.2%}".replace("-", "−")


def _headline(found: Found) -> str:
    if of := found["prediction"]:
        against = f"; measured {of['measured']['measured']:.3f}" if of["measured"] else ""
        return f"{_size(of)} is predicted a loss of {of['loss']['value']:.3f} ({_ends(of['loss'], '.3f')}){against}"
    held = found["hold_out"]
    if held is None:
        return "The law was not held against a size that it has not seen, and predicts nothing"
    worst = max(held["checks"], key=lambda c: abs(c["relative_error"]))
    size = format_tokens(held["parameters"], 3)
    return f"From the smaller sizes the loss of {size} is predicted within {abs(worst['relative_error']):.2%}"


def _figures(found: Found) -> list[tuple[str, str, str]]:
    """Title, value and detail."""
    fitted = [run for run in found["runs"] if run["in_fit"]]
    figures = []
    if held := found["hold_out"]:
        worst = max(held["checks"], key=lambda c: abs(c["relative_error"]))
        from_runs = f"{_size(worst)}, from {held['num_runs']} smaller runs"
        figures.append(("largest size, held out", _percent(worst["relative_error"]), from_runs))
    if of := found["prediction"]:
        if of["measured"]:
            detail = "of the predicted loss from the measured one"
            figures.append(("prediction", _percent(of["measured"]["relative_error"]), detail))
        if of["error"]:
            figures.append(("predicted error", f"{of['error']['value']:.3f}", _ends(of["error"], ".3f")))
        factor = 6 * of["parameters"] * of["tokens"] / max(run["compute"] for run in fitted)
        figures.append(("extrapolation", f"{factor:,.3g}×", "the compute of the largest run that was fitted"))
    noise = found["noise"]
    if noise["seeds"] is not None:
        figures.append(("noise between seeds", f"{noise['seeds']:.4f}", f"nats, over {noise['num_seeds']} runs"))
    sizes = len({run["parameters"] for run in fitted})
    figures.append(
        ("fitted", f"{len(fitted)} runs", f"of {sizes} sizes; {found['refits']} refits behind the intervals")
    )
    return figures


def _checks(found: Found) -> list[tuple[str, str, str, str, str, str]]:
    """What, of which run, predicted, interval, measured, off by."""
    rows = []
    of = found["prediction"] or {}
    for what, held, predicted, measured in (
        ("loss", found["hold_out"], of.get("loss"), of.get("measured")),
        ("error", of.get("error_hold_out"), of.get("error"), of.get("measured_error")),
    ):
        for c in held["checks"] if held else []:
            rows.append((f"{what}, held out", _size(c), *_compared(c["predicted"], c)))
        if predicted:
            rows.append((f"{what}, predicted", _size(of), *_compared(predicted, measured)))
    return rows


def _compared(predicted: Found, measured: Found | None) -> tuple[str, str, str, str]:
    against = (f"{measured['measured']:.4f}", _percent(measured["relative_error"])) if measured else ("–", "–")
    return f"{predicted['value']:.4f}", _ends(predicted, ".3f"), *against


def _envelope(found: Found) -> list[tuple[str, str, str, str, str]]:
    """Compute, parameters, tokens, their ratio and loss of six sizes."""
    every = found["envelope"]
    return [
        (
            f"{at['compute']:.2g}".replace("e+", "e"),
            format_tokens(round(at["parameters"]), 3),
            format_tokens(round(at["tokens"]), 3),
            f"{at['tokens'] / at['parameters']:.3g}",
            f"{at['loss']:.3f}",
        )
        for at in every[:: max(1, len(every) // 6)]
    ]


def _runs(found: Found) -> list[tuple[bool, tuple[str, ...]]]:
    """Whether it was fitted; its name and numbers."""
    return [
        (
            run["in_fit"],
            (
                run["name"],
                format_tokens(run["parameters"], 3),
                format_tokens(run["tokens"], 3),
                f"{run['tokens_per_parameter']:.3g}",
                f"{run['loss']:.4f}",
                f"{run['fitted']:.4f}",
                _percent(run["residual"]),
                "–" if run["error"] is None else f"{run['error']:.3f}",
            ),
        )
        for run in found["runs"]
    ]


Cells = dict[tuple[int, int], dict[float, float]]
"""Parameters and tokens -> value of a setting -> mean loss over seeds."""


def _sweeps(found: Found) -> list[tuple[str, Cells]]:
    """Settings that take several values at one size and budget, of the other settings the best."""
    sweeps = []
    for name in sorted({name for run in found["runs"] for name in run["settings"]}):
        losses: dict[tuple[int, int], dict[float, dict[str, list[float]]]] = {}
        for run in found["runs"]:
            if name in run["settings"]:
                others = str(sorted((k, v) for k, v in run["settings"].items() if k != name))
                cell = losses.setdefault((run["parameters"], run["tokens"]), {})
                cell.setdefault(run["settings"][name], {}).setdefault(others, []).append(run["loss"])
        cells = {
            at: {value: min(map(fmean, of.values())) for value, of in sorted(values.items())}
            for at, values in losses.items()
            if len(values) > 1
        }
        if cells:
            sweeps.append((name, cells))
    return sweeps


def _sweep_table(cells: Cells, name: str) -> tuple[list[str], list[tuple[str, list[tuple[str, bool]]]]]:
    """Values, and by size and budget the loss at each and whether it is the best."""
    values = sorted({value for of in cells.values() for value in of})
    rows = [
        (
            f"{format_tokens(n, 3)} on {format_tokens(d, 3)}",
            [(f"{of[v]:.4f}", of[v] == min(of.values())) if v in of else ("–", False) for v in values],
        )
        for (n, d), of in cells.items()
    ]
    return [f"{value:g}" for value in values], rows


def _optimum(of: Found) -> str:
    held = of["hold_out_error"]
    tested = "no size was held out" if held is None else f"of the largest size, held out, it is off by {_percent(held)}"
    return f"best {of['setting']} = {of['scale']:.3g} × N^{of['exponent']:.3f}; {tested}".replace("-", "−")


def _compute_axis(ax: Axes) -> None:
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.0e}".replace("e+", "e")))
    ax.set_xlabel("compute 6ND, FLOP, log scale")


def _points(ax: Axes, runs: Sequence[Found], y: str) -> None:
    for fitted, style in ((False, {"markerfacecolor": "none", "color": MUTED}), (True, {"color": ACCENT})):
        drawn = [run for run in runs if run["in_fit"] is fitted]
        ax.plot([r["compute"] for r in drawn], [r[y] for r in drawn], "o", markersize=4.5, zorder=3, **style)


def _loss_chart(found: Found) -> str:
    with drawing_style():
        figure = Figure(figsize=(_WIDTH_INCHES, 4.2), layout="constrained")
        ax = figure.subplots()
        ends = []
        for curve in found["curves"]:
            ax.plot(curve["compute"], curve["loss"], color=MUTED, linewidth=0.8, alpha=0.7)
            ends.append((curve["loss"][-1], f"{curve['tokens_per_parameter']:.3g} tokens/parameter", MUTED))
        if envelope := found["envelope"]:
            ax.plot(*([at[k] for at in envelope] for k in ("compute", "loss")), color=INK, linestyle=(0, (4, 3)))
            ends.append((envelope[-1]["loss"], "compute-optimal", INK))
        _points(ax, found["runs"], "loss")
        if of := found["prediction"]:
            compute, loss = 6 * of["parameters"] * of["tokens"], of["loss"]
            if loss["low"] is not None:
                ax.vlines(compute, loss["low"], loss["high"], color=SECOND, linewidth=1.6, zorder=4)
            ax.plot(compute, loss["value"], "D", color=SECOND, markersize=6, zorder=5)
            if of["measured"]:
                ax.plot(compute, of["measured"]["measured"], "x", color=INK, markersize=8, zorder=6)
        losses = [run["loss"] for run in found["runs"]] + [at["loss"] for at in envelope]
        pad = 0.04 * (max(losses) - min(losses))
        ax.set_ylim(min(losses) - pad, max(losses) + pad)
        _compute_axis(ax)
        ax.set_ylabel("loss, nats per token")
        name_ends(ax, ends)
        return inline_svg(figure, "study-loss", "Loss against compute: runs, fitted law, prediction")


def _residual_chart(found: Found) -> str:
    with drawing_style():
        figure = Figure(figsize=(_WIDTH_INCHES, 2.4), layout="constrained")
        ax = figure.subplots()
        if noise := found["noise"]["relative"]:
            ax.axhspan(-noise, noise, color=ACCENT, alpha=0.1, linewidth=0)
        ax.axhline(0, color=RULE, linewidth=1)
        _points(ax, found["runs"], "residual")
        ax.set_yscale("symlog", linthresh=0.01)
        ticks = [-0.1, -0.03, -0.01, 0, 0.01, 0.03, 0.1]
        ax.set_yticks([t for t in ticks if abs(t) <= 1.5 * max(0.01, *(abs(r["residual"]) for r in found["runs"]))])
        ax.minorticks_off()
        ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:+.0%}".replace("-", "−") if y else "0"))
        _compute_axis(ax)
        ax.set_ylabel("measured above the law")
        return inline_svg(figure, "study-residuals", "Residuals of the law against compute")


def _sweep_chart(cells: Cells, name: str) -> str:
    with drawing_style():
        figure = Figure(figsize=(_WIDTH_INCHES, 2.8), layout="constrained")
        ax = figure.subplots()
        ends = []
        for (n, d), of in cells.items():
            best = min(of, key=of.get)
            values, losses = zip(*((value, loss - of[best]) for value, loss in of.items()))
            ax.plot(values, losses, "o-", color=ACCENT, markersize=4, linewidth=1)
            ax.plot(best, 0, "o", color=SECOND, markersize=8, markerfacecolor="none", markeredgewidth=1.6)
            ends.append((losses[-1], f"{format_tokens(n, 3)} on {format_tokens(d, 3)}", MUTED))
        ax.set_xscale("log")
        ax.set_xticks(sorted({value for of in cells.values() for value in of}))
        ax.minorticks_off()
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        ax.set_xlabel(f"{name}, log scale; ringed: the best of a size")
        ax.set_ylabel("loss above the best, nats")
        name_ends(ax, ends)
        return inline_svg(figure, f"study-{name.replace('.', '-')}", f"Loss against {name}")
