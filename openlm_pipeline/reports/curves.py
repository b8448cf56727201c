"""Curves against tokens: taken from records, and as a picture so small that Dagster shows it without a click."""

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from openlm_pipeline.units import format_tokens

Records = Sequence[Mapping[str, Any]]
Curve = tuple[np.ndarray, np.ndarray]
"""Tokens and values."""

_LEFT, _RIGHT, _TOP, _BOTTOM, _AXIS = 46, 412, 8, 78, 94
_LINE_POINTS, _DOTS = 48, 12


def series(records: Records, key: str) -> Curve:
    """Tokens and finite values of `key`, in order of tokens; of a step done twice (a resume) the last record counts."""
    by_tokens = {
        int(r["tokens"]): float(r[key]) for r in records if r.get(key) is not None and math.isfinite(float(r[key]))
    }
    tokens = sorted(by_tokens)
    return np.array(tokens, dtype=float), np.array([by_tokens[t] for t in tokens])


def small_picture(description: str, line: Curve, dots: Curve | None = None) -> str | None:
    """One curve as a line and perhaps one as dots, as an image of Markdown; None without a value.

    It has under 1,000 characters, the most that Dagster shows without a click, so points are means of equal runs of
    values. Labels are the highest and the lowest of them, and the last number of tokens.
    """
    curves = [_means(line, _LINE_POINTS), *([_means(dots, _DOTS)] if dots else [])]
    tokens, values = (np.concatenate(parts) for parts in zip(*curves))
    if not len(values):
        return None
    low, high, end = values.min(), values.max(), tokens.max()
    drawn = []
    for at, value in curves:
        x = _LEFT + (_RIGHT - _LEFT) * at / end
        y = _BOTTOM - (_BOTTOM - _TOP) * (value - low) / ((high - low) or 1)
        drawn.append(np.rint(np.stack([x, y], axis=1)).astype(int))
    points = "".join(f"M{x} {y}h0" for x, y in np.concatenate(drawn[1:] or drawn)[-_DOTS:])
    steps = " ".join(f"{x} {y}" for x, y in np.diff(drawn[0], axis=0)).replace(" -", "-")
    path = "M{} {}l{}".format(*drawn[0][0], steps) if steps else ""
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" width="420" height="98" style="background:#fff;font:11px monospace">'
        f'<g fill="none" stroke="#111"><path d="{path}"/>'
        f'<path d="{points}" stroke="#06c" stroke-width="5" stroke-linecap="round"/></g>'
        f'<text y="12">{high:.4g}</text><text y="82">{low:.4g}</text>'
        f'<text x="{_RIGHT}" y="{_AXIS}" text-anchor="end">{format_tokens(int(end), 3)}</text></svg>'
    )
    return f"![{description}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def _means(curve: Curve, points: int) -> Curve:
    """Means of up to so many equal runs of values."""
    runs = np.array_split(np.arange(len(curve[0])), max(1, min(points, len(curve[0]))))
    if not len(curve[0]):
        return curve
    return np.array([curve[0][run].mean() for run in runs]), np.array([curve[1][run].mean() for run in runs])
