"""Charts as HTML: shapes are SVG that stretches, words and numbers are HTML that does not.

So text keeps its size on a phone, and every chart has its numbers beside it: a legend with the last values, a
table, or what the page's script reads out at the pointer or with the arrow keys. Texts are escaped here.
"""

import json
import math
from collections.abc import Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from .axis import Axis, axis, near_axis
from .tables import number, number_table

Doubles = npt.NDArray[np.float64]

WIDTH, HEIGHT = 1000, 400
"""Units of a chart's SVG; it is stretched to whatever room there is."""
SHADES = 16
"""Steps of a map's shade; its numbers are exact."""


class Line(NamedTuple):
    name: str
    x: Doubles
    y: Doubles
    low: Doubles | None = None
    """With `high`: a band around the line"""
    high: Doubles | None = None


class Dot(NamedTuple):
    mark: str
    """Text in the dot, a number say"""
    name: str
    x: float
    y: float


def line_chart(
    ident: str, title: str, note: str, lines: Sequence[Line], *, log: bool | None = None
) -> tuple[str, dict[str, Any]]:
    """A chart of lines over optimiser steps, and the numbers that the page's script reads out."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return _figure(ident, title, note, '<p class="none">No numbers yet.</p>'), {}
    bounds = [part for line in lines for part in (line.y, line.low, line.high) if part is not None]
    y = axis(np.concatenate(bounds), log)
    x = axis(np.concatenate([line.x for line in lines]), log=False)._replace(
        last=max(float(line.x[-1]) for line in lines)
    )
    paths = "".join(_band(line, x, y) for line in lines)
    paths += "".join(_path(line, x, y, f"line l{nth % 4}") for nth, line in enumerate(lines))
    label = f"{title}: " + ", ".join(f"{line.name} ends at {number(line.y[-1])}" for line in lines)
    frame = (
        f'<div class="frame">{_y_labels(y)}<div class="plot" data-plot="{ident}">'
        f"{_svg(_grid(y) + paths, label)}</div>{_x_labels(x)}</div>"
    )
    steps = np.unique(np.concatenate([line.x for line in lines]))
    data = {
        "x": steps.astype(int).tolist(),
        "first": x.first,
        "last": x.last,
        "lines": [{"name": line.name, "y": _rounded(_at(line, steps))} for line in lines],
    }
    return _figure(ident, title, note, _legend(lines) + frame + "<output></output>"), data


def scatter_chart(
    ident: str,
    title: str,
    note: str,
    dots: Sequence[Dot],
    line: Sequence[tuple[float, float]],
    axes: tuple[str, str],
) -> str:
    """Dots with their marks, and a line through the points (x, y) of `line`; axes: names of x and y.

    Axes begin near the lowest value, and are logarithmic where the values ask for it.
    """
    if not dots:
        return _figure(ident, title, note, '<p class="none">No numbers yet.</p>')
    across, down = (np.array([dot[place] for dot in dots], np.float64) for place in (2, 3))
    x, y = near_axis(across), near_axis(down)
    marks = "".join(_dot(dot, x, y, axes) for dot in dots)
    path = _path(Line("", *np.array(line, np.float64).T), x, y, "line l0") if len(line) > 1 else ""
    label = f"{title}: " + ", ".join(f"{dot.name} {number(dot.x)}, {number(dot.y)}" for dot in dots)
    frame = (
        f'<div class="frame">{_y_labels(y)}<div class="plot dots">{_svg(_grid(y) + path, label)}{marks}</div>'
        f'{_x_labels(x)}<div class="axes">{escape(axes[1])} ↑ &nbsp; {escape(axes[0])} →</div></div>'
    )
    return _figure(ident, title, note, frame)


def _dot(dot: Dot, x: Axis, y: Axis, axes: tuple[str, str]) -> str:
    """HTML, not SVG: that is stretched, and would make ellipses of them."""
    place = f"left:{100 * float(x.place(dot.x)):.2f}%;top:{100 * (1 - float(y.place(dot.y))):.2f}%"
    words = f"{escape(dot.name)}: {axes[0]} {number(dot.x)}, {axes[1]} {number(dot.y)}"
    return (
        f'<span class="dot" style="{place}" data-name="{escape(dot.name)}" data-x="{dot.x:.9g}" '
        f'data-y="{dot.y:.9g}" title="{words}">{escape(dot.mark)}</span>'
    )


def small_charts(ident: str, title: str, note: str, lines: Sequence[Line]) -> str:
    """One small chart a line, all on the same axes."""
    lines = [line for line in lines if len(line.x)]
    if not lines:
        return _figure(ident, title, note, '<p class="none">No numbers yet.</p>')
    y = axis(np.concatenate([line.y for line in lines]))
    x = axis(np.concatenate([line.x for line in lines]), log=False)._replace(
        last=max(float(line.x[-1]) for line in lines)
    )
    cells = "".join(
        f'<li data-name="{escape(line.name)}" data-value="{line.y[-1]:.6g}"><span>{escape(line.name)}</span> '
        f"<b>{number(line.y[-1])}</b>"
        f"{_svg(_grid(y) + _path(line, x, y, 'line l0'), f'{line.name} ends at {number(line.y[-1])}')}</li>"
        for line in lines
    )
    ticks = ", ".join(number(tick) for tick in y.ticks)
    kind = "logarithmic" if y.log else "linear"
    scale = (
        f'<p class="note">All have the same {kind} axis; lines at {ticks}. The number is the last value.</p>'
    )
    return _figure(ident, title, note, f'{scale}<ul class="small">{cells}</ul>')


def heat_map(
    ident: str,
    title: str,
    note: str,
    values: Doubles,
    axes: tuple[str, str],
    names: tuple[list[str], list[str]],
) -> tuple[str, dict[str, Any]]:
    """values (row, column), NaN where there is none; darker (in dark mode: lighter) is more."""
    rows, columns = values.shape
    top = float(np.nanmax(values)) if np.isfinite(values).any() else 0.0
    shade = np.ceil(np.nan_to_num(values / (top or 1.0), posinf=1.0) * SHADES).astype(int)
    paths = "".join(
        f'<path class="cell" style="--s:{level / SHADES:.3f}" d="'
        + "".join(f"M{c} {r}h1v1h-1z" for r, c in np.argwhere((shade == level) & np.isfinite(values)))
        + '"/>'
        for level in range(SHADES + 1)
        if ((shade == level) & np.isfinite(values)).any()
    )
    label = f"{title}: {rows} rows ({axes[0]}) and {columns} columns ({axes[1]}), at most {number(top)}"
    svg = _svg(paths, label, columns, rows)
    frame = (
        f'<div class="frame map">{_map_labels("y", names[0])}<div class="plot" data-map="{ident}">{svg}</div>'
        f'{_map_labels("x", names[1])}<div class="axes">{escape(axes[0])} ↓ &nbsp; '
        f"{escape(axes[1])} →</div></div>"
    )
    key = '<p class="key"><span>0</span><i></i><span>' + number(top) + "</span></p>"
    numbers = f"<details><summary>All numbers</summary>{number_table(values, axes, names, title)}</details>"
    data = {"axes": axes, "rows": names[0], "columns": names[1], "values": [_rounded(row) for row in values]}
    return _figure(ident, title, note, key + frame + "<output></output>" + numbers), data


def embedded(data: dict[str, Any]) -> str:
    """JSON that can stand inside a script element."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _figure(ident: str, title: str, note: str, body: str) -> str:
    said = f'<p class="note">{escape(note)}</p>' if note else ""
    return f'<figure id="{ident}"><figcaption><h3>{escape(title)}</h3>{said}</figcaption>{body}</figure>'


def _svg(shapes: str, label: str, width: int = WIDTH, height: int = HEIGHT) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" role="img" '
        f'aria-label="{escape(label)}">{shapes}</svg>'
    )


def _points(x: Doubles, y: Doubles, axes: tuple[Axis, Axis]) -> list[str]:
    across, down = WIDTH * axes[0].place(x), HEIGHT * (1 - axes[1].place(y))
    return [f"{a:.0f} {b:.1f}" for a, b in zip(across, down, strict=True)]


def _path(line: Line, x: Axis, y: Axis, css: str) -> str:
    return f'<path class="{css}" d="M{"L".join(_points(line.x, line.y, (x, y)))}"/>'


def _band(line: Line, x: Axis, y: Axis) -> str:
    if line.low is None or line.high is None:
        return ""
    there, back = (_points(line.x, line.high, (x, y)), _points(line.x, line.low, (x, y))[::-1])
    return f'<path class="band" d="M{"L".join(there + back)}z"/>'


def _grid(y: Axis) -> str:
    places = HEIGHT * (1 - y.place(y.ticks))
    return f'<path class="grid" d="{"".join(f"M0 {place:.1f}H{WIDTH}" for place in places)}"/>'


def _y_labels(y: Axis) -> str:
    labels = zip(y.ticks, 100 * (1 - y.place(y.ticks)), strict=True)
    inner = "".join(f'<span style="top:{place:.2f}%">{number(tick)}</span>' for tick, place in labels)
    widest = max(len(number(tick)) for tick in y.ticks)
    return f'<div class="y" aria-hidden="true" style="min-width:{widest + 1}ch">{inner}</div>'


def _x_labels(x: Axis) -> str:
    ticks = [tick for tick in x.ticks if tick <= x.last]
    labels = zip(ticks, 100 * x.place(ticks), strict=True)
    inner = "".join(f'<span style="left:{place:.2f}%">{_short(tick)}</span>' for tick, place in labels)
    return f'<div class="x" aria-hidden="true">{inner}</div>'


def _map_labels(side: str, names: list[str]) -> str:
    """Every nth name, so that those beside a map have room on a phone."""
    longest, edge = max(map(len, names)), "top" if side == "y" else "left"
    every = -(-len(names) // (8 if side == "y" else max(2, min(8, 32 // (longest + 2)))))
    inner = "".join(
        f'<span style="{edge}:{100 * (place + 0.5) / len(names):.2f}%">{escape(names[place])}</span>'
        for place in range(0, len(names), every)
    )
    width = f' style="min-width:{longest + 1}ch"' if side == "y" else ""
    return f'<div class="{side}" aria-hidden="true"{width}>{inner}</div>'


def _at(line: Line, steps: Doubles) -> Doubles:
    """The line's values at `steps`, NaN where it has none."""
    values = np.full(len(steps), np.nan)
    values[np.searchsorted(steps, line.x)] = line.y
    return values


def _legend(lines: Sequence[Line]) -> str:
    items = "".join(
        f'<li data-name="{escape(line.name)}" data-value="{line.y[-1]:.9g}">'
        f'<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true">'
        f'<path class="line l{nth % 4}" d="M0 4H28"/></svg>'
        f"{escape(line.name)} <b>{number(line.y[-1])}</b></li>"
        for nth, line in enumerate(lines)
    )
    return f'<ul class="legend">{items}</ul>'


def _short(value: float) -> str:
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def _rounded(values: Doubles) -> list[float | None]:
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
