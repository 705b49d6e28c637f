"""report.html: what a run did, in one file that needs no network."""

import base64
import hashlib
import math
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ..cache_format.files import write_file
from . import report_sections as sections
from .charts import embedded
from .run_report import RunReport
from .tables import number


def write_page(path: Path, report: RunReport) -> None:
    """Put the page at `path` in one step."""
    write_file(path, render_page(report).encode())


def render_page(report: RunReport) -> str:
    """One HTML document; the same report gives the same bytes."""
    fvu, charts = sections.fvu_curves(report)
    training, more_charts = sections.training_curves(report)
    latents, latent_charts, latent_maps = sections.latents(report)
    decoders, maps = sections.decoders(report)
    numbers = {"charts": {**charts, **more_charts, **latent_charts}, "maps": {**maps, **latent_maps}}
    parts = {
        "held-out": ("Held-out tokens", sections.held_out(report)),
        "fvu": ("Loss and FVU while training", fvu),
        "latents": ("Latents", latents),
        "decoders": ("Decoders", decoders),
        "training": ("Training", training),
        "settings": ("Settings and cache", sections.settings(report)),
    }
    return render_document(report.name, _header(report), parts, numbers)


def render_document(name: str, head: str, parts: dict[str, tuple[str, str]], numbers: dict[str, Any]) -> str:
    """A page of sections: parts are (title, HTML) by id; numbers are what the script reads out of charts."""
    style, script = (Path(__file__).with_name(f"report_page.{kind}").read_text() for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    links = "".join(f'<a href="#{ident}">{title}</a>' for ident, (title, _) in parts.items())
    body = "".join(
        f'<section id="{ident}" aria-labelledby="{ident}-title">'
        f'<h2 id="{ident}-title">{title}</h2>{text}</section>'
        for ident, (title, text) in parts.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(name)}, clt</title>"
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{style}</style></head><body><header>{head}"
        f'<nav aria-label="Sections">{links}</nav></header><main>{body}</main>{_FOOTER}'
        f'<script type="application/json" id="data">{embedded(numbers)}</script><script>{script}</script>'
        "</body></html>\n"
    )


_FOOTER = (
    "<footer>FVU: fraction of variance unexplained, squared error over variance; 0 is perfect, 1 is "
    "as good as the mean. "
    "Point at a chart or a map to read its numbers; or reach it with Tab and use the arrow keys."
    "</footer>"
)


def _header(report: RunReport) -> str:
    last, held, place = report.curves.last, report.held_out, report.place
    done = "complete" if place.step >= place.steps else f"stopped or saved at step {place.step:,}"
    lead = (
        f"Cross-layer transcoder, {len(report.layers)} layers of {report.cache.get('model')}; {done}: "
        f"{place.step:,} of {place.steps:,} steps, {place.tokens:,} tokens"
    )
    tiles = {
        "Held-out FVU": (math.nan if isinstance(held, str) else held.fvu.mean(), "", "mean of the layers"),
        "Training FVU": (_value(last, "fvu"), "", f"last line, step {last.get('step', 0):,}"),
        "L0": (_layer_mean(report, "l0"), "", "positive activations, token and layer"),
        "Dead latents": (100 * _layer_mean(report, "dead"), " %", "long not positive"),
        "Speed": (_over_lines(report, "tokens_per_s"), "", "tokens a second, mean of the lines"),
        "Stall": (100 * _over_lines(report, "stall"), " %", "of the time waiting for the cache"),
    }
    cells = "".join(
        f'<div><dt>{name}</dt><dd data-name="{name}" data-value="{value:.9g}">{_short(float(value), unit)}'
        f"<small>{small}</small></dd></div>"
        for name, (value, unit, small) in tiles.items()
    )
    return f'<h1>{escape(report.name)}</h1><p class="lead">{escape(lead)}</p><dl class="tiles">{cells}</dl>'


def _short(value: float, unit: str) -> str:
    """Percent with one decimal; others as everywhere."""
    return f"{value:.1f}{unit}" if unit and math.isfinite(value) else f"{number(value)}{unit}"


def _over_lines(report: RunReport, metric: str) -> float:
    values = report.curves[metric].mean
    return float(values.mean()) if len(values) else math.nan


def _layer_mean(report: RunReport, metric: str) -> float:
    return float(np.mean([_value(report.curves.last, f"{metric}/{layer}") for layer in report.layers]))


def _value(line: dict[str, Any], name: str) -> float:
    value = line.get(name)
    return math.nan if value is None else float(value)
