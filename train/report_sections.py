"""The sections of report.html: each gives its HTML, and the numbers that the page's script reads out."""

from html import escape
from itertools import pairwise
from typing import Any

import numpy as np

from .charts import Line, heat_map, line_chart, small_charts
from .curves import Curve, Doubles
from .run_report import RunReport
from .tables import bar_table, fact_table

SMALL_POINTS = 120
"""Points of a small chart."""
OTHER_LOSSES = ("sparsity", "auxk", "dead_latents")
"""Beside FVU; a run has those that it gave a weight."""
LEAST_POWER = -7
"""Activation frequencies below 10 to this power share one bin."""


def held_out(report: RunReport) -> str:
    held = report.held_out
    if isinstance(held, str):
        return f'<p class="none">{escape(held)}</p>'
    kinds = [(kind, float(values.mean())) for kind, values in held.fvu_kind.items()]
    offsets = [(str(offset), value) for offset, value in held.fvu_without_offset.items()]
    layers = [
        (str(layer), float(fvu), float(l0), f"{dead:.1%}")
        for layer, fvu, l0, dead in zip(report.layers, held.fvu, held.l0, held.dead, strict=True)
    ]
    tokens = f"{held.tokens:,} tokens of split val"
    without = bar_table(
        ["Offset", "FVU without it"],
        [("none left out", float(held.fvu.mean())), *offsets],
        "Mean FVU when what sources write across one offset (target - source) is left out",
    )
    by_kind = bar_table(["Kind", "FVU"], kinds, f"By kind, mean of the layers; {tokens}")
    by_layer = bar_table(["Layer", "FVU", "L0", "Dead"], layers, f"By layer; {tokens}")
    return (
        f'<div class="grid2"><figure id="held-out-layer">{by_layer}</figure>'
        f'<div><figure id="held-out-kind">{by_kind}</figure>'
        f'<figure id="held-out-offset">{without}</figure></div></div>'
    )


def fvu_curves(report: RunReport) -> tuple[str, dict[str, Any]]:
    curves = report.curves
    kinds = [name for name in curves.names if name.startswith("fvu_kind/")]
    charts = {
        "loss": _chart(report, "loss", "Loss", "sum over target layers", {"loss": "loss"}),
        "fvu-mean": _chart(report, "fvu-mean", "FVU", "mean over layers", {"fvu": "FVU"}),
        "fvu-kind": _chart(
            report,
            "fvu-kind",
            "FVU by kind",
            "of each kind's own variance, mean over layers",
            {name: name.removeprefix("fvu_kind/") for name in kinds},
        ),
    }
    if others := {name: name for name in OTHER_LOSSES if name in curves.names}:
        charts["loss-other"] = _chart(report, "loss-other", "Other losses", "weights included", others)
    small = small_charts(
        "fvu-layer",
        "FVU by layer",
        "",
        [thin(_line(curves[f"fvu/{n}"], f"layer {n}")) for n in report.layers],
    )
    text = f'<div class="grid3 tall">{"".join(text for text, _ in charts.values())}</div>{small}'
    return text, {ident: data for ident, (_, data) in charts.items()}


def training_curves(report: RunReport) -> tuple[str, dict[str, Any]]:
    names = {
        "lr": ("Learning rate", "of the last step of each line"),
        "k": ("k", "active latents of a token and layer that are allowed"),
        "grad_norm": ("Gradient norm", "before clipping, mean of the steps"),
        "tokens_per_s": ("Tokens a second", "training steps only"),
        "stall": ("Stall", "share of the time that a step waited for the cache"),
        "shuffle_m": ("Shuffle m", "tokens of its own sample that a token meets in its batch"),
    }
    charts = {
        name: _chart(report, name, title, note, {name: name}, log=False if name != "grad_norm" else None)
        for name, (title, note) in names.items()
    }
    text = f'<div class="grid3">{"".join(text for text, _ in charts.values())}</div>'
    return text, {ident: data for ident, (_, data) in charts.items()}


def latents(report: RunReport) -> tuple[str, dict[str, Any], dict[str, Any]]:
    l0, l0_data = _across_layers(report, "l0", "L0", "positive activations of a token")
    dead, dead_data = _across_layers(report, "dead", "Dead latents", "share that was long not positive")
    counts, names = _histogram(report.frequency)
    total = counts.sum(axis=0)
    rows = [(name, float(n), f"{n / max(1, total.sum()):.1%}") for name, n in zip(names, total, strict=True)]
    bars = bar_table(
        ["Share of tokens", "Latents", ""],
        rows,
        f"Activation frequency: for what share of tokens a latent is positive; the last "
        f"{report.counted_tokens:,} training tokens, {int(total.sum()):,} latents",
    )
    layers = [str(layer) for layer in report.layers]
    shown, data = heat_map(
        "frequency-layer",
        "Activation frequency by layer",
        "Number of latents of each layer in each bin",
        counts,
        ("layer", "share of tokens, from"),
        (layers, [name.split(" to ")[0] for name in names]),
    )
    text = (
        f'<div class="grid2">{l0}{dead}<figure id="frequency">{bars}</figure>'
        f'<div class="wide">{shown}</div></div>'
    )
    return text, {"l0": l0_data, "dead": dead_data}, {"frequency-layer": data}


def _histogram(frequency: Doubles) -> tuple[Doubles, list[str]]:
    """(layer, bin): latents by half decades of their frequency, and the bins' names."""
    powers = np.arange(2 * LEAST_POWER, 1) / 2
    edges = [0.0, *(10.0 ** powers[:-1]), 1.0000001]
    never = (frequency == 0).sum(axis=1)
    bins = [np.histogram(row[row > 0], edges)[0] for row in frequency]
    names = [f"{_power(a)} to {_power(b)}" for a, b in pairwise(powers)]
    counts = np.column_stack([never, bins]).astype(np.float64)
    keep = [0, *range(_first(counts), counts.shape[1])]
    every = ["never", f"< {_power(powers[0])}", *names]
    return counts[:, keep], [every[place] for place in keep]


def _first(counts: Doubles) -> int:
    """The first bin after "never" that is not empty."""
    filled = np.flatnonzero(counts[:, 1:].sum(axis=0))
    return int(filled[0]) + 1 if len(filled) else counts.shape[1] - 1


def _power(power: float) -> str:
    return f"{10.0**power:.1g}".replace("e-0", "e-")


def decoders(report: RunReport) -> tuple[str, dict[str, Any]]:
    layers = [str(layer) for layer in report.layers]
    text, data = heat_map(
        "decoder-norms",
        "Decoder norm, source by target",
        "Mean over latents of the norm of what one writes to the target at activation 1, in standard units",
        report.decoder_norms,
        ("source", "target"),
        (layers, layers),
    )
    return text, {"decoder-norms": data}


def settings(report: RunReport) -> str:
    return (
        f'<div class="grid2"><figure id="run-settings">{fact_table(report.settings, "The run")}</figure>'
        f'<figure id="cache-identity">{fact_table(report.cache, "The cache")}</figure></div>'
    )


def _chart(
    report: RunReport, ident: str, title: str, note: str, names: dict[str, str], log: bool | None = None
) -> tuple[str, dict[str, Any]]:
    """Metrics by name as lines; one alone gets a band from its lowest to its highest line."""
    curves = [(report.curves[metric], name) for metric, name in names.items()]
    lines = [_line(curve, name) for curve, name in curves]
    if len(lines) == 1 and report.curves.stride > 1:
        lines = [lines[0]._replace(low=curves[0][0].low, high=curves[0][0].high)]
        note += f"; each point is the mean of {report.curves.stride} lines, the band their range"
    return line_chart(ident, title, note, lines, log=log)


def _across_layers(report: RunReport, metric: str, title: str, note: str) -> tuple[str, dict[str, Any]]:
    """Mean over layers, with a band from the lowest to the highest layer."""
    curves = [report.curves[f"{metric}/{layer}"] for layer in report.layers]
    if not len(curves[0].step):
        return line_chart(metric, title, note, [])
    table = np.stack([curve.mean for curve in curves])
    line = Line(title, curves[0].step, table.mean(axis=0), table.min(axis=0), table.max(axis=0))
    return line_chart(
        metric, title, f"{note}: mean of the layers, and the band they lie in", [line], log=False
    )


def _line(curve: Curve, name: str) -> Line:
    return Line(name, curve.step, curve.mean)


def thin(line: Line) -> Line:
    """Means of neighbours, but for the last point, which stays."""
    if len(line.x) <= SMALL_POINTS:
        return line
    starts = np.unique(np.linspace(0, len(line.x) - 1, SMALL_POINTS).astype(int))
    sizes = np.diff([*starts, len(line.x)])
    ends = starts + sizes - 1
    return Line(line.name, line.x[ends], np.add.reduceat(line.y, starts) / sizes)
