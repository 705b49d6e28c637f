"""What came of a sweep: a table and the frontier of L0 and FVU, for a terminal and as report.html."""

from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..cache_format.files import write_file
from .charts import Dot, Line, line_chart, scatter_chart, small_charts
from .curves import Curves
from .evaluate import Evaluation
from .report_page import render_document
from .report_sections import thin
from .run import Run
from .sweep_file import Entry
from .tables import NO_NUMBER, number, plain_table

LINE_STYLES = 4
"""More runs than that are not told apart in one chart: each gets a small one."""


class SweepRun(NamedTuple):
    """One row of the table."""

    label: str
    settings: dict[str, Any]
    run: Path
    step: int
    """Optimiser steps done"""
    parameters: int | None
    """None, as all numbers below, where it diverged"""
    fvu: float | None
    """Mean over layers, held out; of the last line of metrics.jsonl where split val has no tokens"""
    l0: float | None
    dead: float | None
    """Of the same tokens as `fvu`"""
    held_out: dict[str, Any] | None
    """As `Evaluation.to_json`"""
    curves: Curves
    diverged: str | None = None
    """Why it was dropped"""

    @classmethod
    def of(cls, entry: Entry, run: Run, held_out: Evaluation | str) -> "SweepRun":
        shape, curves = run.model.shape, run.log.curves
        if isinstance(held_out, str):
            (fvu, l0, dead), found = _last_numbers(curves, shape.layers), None
        else:
            fvu, l0, dead = (float(values.mean()) for values in (held_out.fvu, held_out.l0, held_out.dead))
            found = held_out.to_json(shape.layers)
        return cls(
            entry.label,
            entry.settings,
            run.config.run,
            run.step,
            shape.n_parameters,
            fvu,
            l0,
            dead,
            found,
            curves,
        )

    @classmethod
    def of_diverged(cls, entry: Entry, run: Path, reason: str) -> "SweepRun":
        curves = Curves.read(run / "metrics.jsonl")
        step = curves.last.get("step", 0)
        return cls(entry.label, entry.settings, run, step, None, None, None, None, None, curves, reason)

    def to_json(self) -> dict[str, Any]:
        settings = {
            name: str(value) if isinstance(value, Path) else value for name, value in self.settings.items()
        }
        left = {name: value for name, value in self._asdict().items() if name != "curves"}
        return {**left, "settings": settings, "run": str(self.run)}


class SweepReport(NamedTuple):
    folder: Path
    runs: list[SweepRun]
    """In the order of the file"""
    steps: int
    tokens: int
    """Of each run, as planned"""
    seconds: float
    """Of the steps of this process, of all runs, checkpoints included"""
    stall: float
    """Share of them spent waiting for the cache"""

    @property
    def frontier(self) -> list[SweepRun]:
        """Runs that no other beats in both L0 and FVU, by ascending L0."""
        return frontier(self.runs)

    @property
    def measured_on(self) -> str:
        held = any(run.held_out is not None for run in self.runs)
        return "held-out tokens" if held else "the last line of metrics.jsonl, for split val has no tokens"

    def to_json(self) -> dict[str, Any]:
        return {
            **self._asdict(),
            "folder": str(self.folder),
            "runs": [run.to_json() for run in self.runs],
            "frontier": [run.label for run in self.frontier],
        }


def frontier(runs: list[SweepRun]) -> list[SweepRun]:
    best: list[SweepRun] = []
    known = [run for run in runs if run.diverged is None and run.fvu is not None and run.l0 is not None]
    for run in sorted(known, key=lambda run: (run.l0, run.fvu)):
        if not best or run.fvu < best[-1].fvu:  # type: ignore[operator]
            best.append(run)
    return best


def render_sweep(report: SweepReport) -> str:
    """For a terminal; `*` marks the frontier."""
    best = {run.label for run in report.frontier}
    width = max(len(run.label) for run in report.runs)
    lines = [
        f"{'run':<{width}}  {'FVU':>8} {'L0':>8} {'dead':>7} {'parameters':>12}",
        *(_row(run, width, run.label in best) for run in report.runs),
        f"{len(report.runs)} runs of {report.steps} steps, {report.tokens} tokens, {report.seconds:.0f} s, "
        f"{report.stall:.1%} of it waiting for the cache",
        f"FVU, L0 and dead of {report.measured_on}; *: no other run has a smaller FVU at as small an L0",
        f"report   {report.folder / 'report.html'}; of one run: {report.folder}/RUN/report.html",
    ]
    return "\n".join(lines)


def _row(run: SweepRun, width: int, best: bool) -> str:
    if run.diverged is not None:
        return f"{run.label:<{width}}  diverged: {run.diverged}"
    fvu, l0, dead = (value if value is not None else float("nan") for value in (run.fvu, run.l0, run.dead))
    return f"{run.label:<{width}}  {fvu:>8.4f} {l0:>8.1f} {dead:>7.1%} {run.parameters:>12,}{' *' * best}"


def write_sweep_page(report: SweepReport) -> None:
    """report.html of the whole sweep."""
    write_file(report.folder / "report.html", render_sweep_page(report).encode())


def render_sweep_page(report: SweepReport) -> str:
    """One HTML document; the same report gives the same bytes."""
    curves, data = _curves(report)
    parts = {
        "frontier": ("L0 and FVU", _frontier_chart(report)),
        "runs": ("Runs", _table(report)),
        "curves": ("FVU while training", curves),
    }
    dropped = sum(run.diverged is not None for run in report.runs)
    lead = (
        f"Sweep of {len(report.runs)} runs from one read of the cache; {report.steps:,} steps and "
        f"{report.tokens:,} tokens each" + (f"; {dropped} diverged" if dropped else "")
    )
    head = f'<h1>{escape(report.folder.resolve().name)}</h1><p class="lead">{escape(lead)}</p>'
    return render_document(report.folder.resolve().name, head, parts, {"charts": data, "maps": {}})


def _frontier_chart(report: SweepReport) -> str:
    known = {run.label: nth for nth, run in enumerate(report.runs, start=1) if run.fvu is not None}
    dots = [
        Dot(str(known[run.label]), run.label, float(run.l0 or 0), float(run.fvu or 0))
        for run in report.runs
        if run.label in known and run.diverged is None
    ]
    line = [(float(run.l0 or 0), float(run.fvu or 0)) for run in report.frontier]
    note = f"Each run by its number in the table; the line is the frontier. Of {report.measured_on}"
    return scatter_chart("l0-fvu", "FVU over L0", note, dots, line, ("L0", "FVU"))


def _table(report: SweepReport) -> str:
    best = {run.label for run in report.frontier}
    names = list(dict.fromkeys(name for run in report.runs for name in run.settings))
    head = ["", "Run", "FVU", "L0", "Dead", "Parameters", "Frontier", *names]
    rows = []
    for nth, run in enumerate(report.runs, start=1):
        numbers = [NO_NUMBER if value is None else number(value) for value in (run.fvu, run.l0)]
        dead = NO_NUMBER if run.dead is None else f"{run.dead:.1%}"
        size = NO_NUMBER if run.parameters is None else f"{run.parameters:,}"
        place = "diverged" if run.diverged is not None else "yes" if run.label in best else ""
        settings = [str(run.settings.get(name, "")) for name in names]
        rows.append([str(nth), run.label, *numbers, dead, size, place, *settings])
    pages = {run.label: run.run / "report.html" for run in report.runs}
    links = {label: f"{page.parent.name}/{page.name}" for label, page in pages.items() if page.exists()}
    faults = "".join(
        f'<p class="note">{escape(run.label)} diverged: {escape(run.diverged)}</p>'
        for run in report.runs
        if run.diverged is not None
    )
    table = plain_table(head, rows, f"Of {report.measured_on}", links)
    return f'<figure id="sweep-runs">{table}{faults}</figure>'


def _curves(report: SweepReport) -> tuple[str, dict[str, Any]]:
    lines = []
    for run in report.runs:
        curve = run.curves["fvu"]
        if len(curve.step):
            lines.append(Line(run.label, curve.step, curve.mean))
    words = ("fvu-runs", "FVU", "mean over layers, of training tokens")
    if len(lines) > LINE_STYLES:
        return small_charts(*words, [thin(line) for line in lines]), {}
    text, data = line_chart(*words, lines)
    return text, {"fvu-runs": data}


def _last_numbers(curves: Curves, layers: tuple[int, ...]) -> list[float | None]:
    """FVU, L0 and dead share of the newest line."""
    if not (line := curves.last):
        return [None, None, None]
    l0, dead = (float(np.mean([line[f"{name}/{layer}"] for layer in layers])) for name in ("l0", "dead"))
    return [line["fvu"], l0, dead]
