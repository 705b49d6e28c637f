"""Results as text for a terminal."""

from pathlib import Path
from typing import Any

from .checkpoint import checkpoint_folder, load_transcoder
from .evaluate import Evaluation, evaluate
from .loop import TrainReport, open_source
from .run_folder import load_config

STALL_ADVICE = 0.05
"""Say what helps when more than this share of a run was spent waiting for the cache."""


def evaluate_cache(
    run: Path, split: str, caches: tuple[Path, ...], threads: int | None
) -> tuple[dict[str, Any], str]:
    """Held-out numbers of a run or checkpoint, as JSON and as text; no caches: the run's own."""
    folder = checkpoint_folder(run)
    source = open_source(load_config(folder.parent), split, caches or None)
    model = load_transcoder(folder)
    evaluation = evaluate(model, source, threads=threads)
    layers = model.shape.layers
    return evaluation.to_json(layers), render_evaluation(evaluation, layers)


def render_training(report: TrainReport) -> str:
    """What came of a run, and where it is."""
    rows = {"run": f"{report.run}: {report.steps} steps, {report.tokens} tokens", "trained": _trained(report)}
    if held := report.held_out:
        kinds = ", ".join(f"{kind} {fvu:.4f}" for kind, fvu in held["fvu_kind"].items())
        rows["held out"] = (
            f"FVU {held['fvu']:.4f} on {held['tokens']} tokens ({kinds}), L0 {held['l0']:.1f}, "
            f"dead {held['dead']:.1%}"
        )
    else:
        rows["held out"] = "no tokens in split val; `clt eval --cache` takes another cache"
    rows["report"] = f"{report.run / 'report.html'}; by layer and offset: clt eval {report.run}"
    return "\n".join(f"{name:<8} {text}" for name, text in rows.items())


def _trained(report: TrainReport) -> str:
    if report.fvu is None:
        return "nothing, it was complete"
    advice = "; more --threads or a faster disk would help" if report.stall > STALL_ADVICE else ""
    return (
        f"FVU of the last step {report.fvu:.4f}; {report.seconds:.0f} s, {report.stall:.1%} of it waiting "
        f"for the cache{advice}"
    )


def render_evaluation(evaluation: Evaluation, layers: tuple[int, ...]) -> str:
    """Held-out numbers: totals, by kind, by offset, by layer."""
    sure = evaluation.intervals
    kinds = [f"{k} {v.mean():.4f} ± {sure.fvu_kind[k]:.4f}" for k, v in evaluation.fvu_kind.items()]
    offsets = evaluation.fvu_without_offset
    without = [f"{o}: {v:.4f} ± {sure.fvu_without_offset[o]:.4f}" for o, v in offsets.items()]
    lines = [
        f"{evaluation.tokens} tokens: FVU {evaluation.fvu.mean():.4f} ± {sure.fvu:.4f} (mean over layers), "
        f"explained variance {evaluation.explained.mean():.4f} ± {sure.explained:.4f}, "
        f"L0 {evaluation.l0.mean():.1f} ± {sure.l0:.1f}, dead {evaluation.dead.mean():.1%} ± {sure.dead:.1%}",
        "FVU by kind     " + ", ".join(kinds),
        "FVU without an offset (target - source)",
        *("                " + ", ".join(without[i : i + 6]) for i in range(0, len(without), 6)),
        "layer   FVU               explained         L0              dead",
    ]
    e = evaluation
    numbers = (e.fvu, sure.fvu_layer, e.explained, sure.explained_layer, e.l0, sure.l0_layer)
    for row in zip(layers, *numbers, e.dead, sure.dead_layer, strict=True):
        lines.append(
            "{:>5}   {:.4f} ± {:.4f}   {:.4f} ± {:.4f}   {:>6.1f} ± {:<4.1f}   {:>5.1%} ± {:.1%}".format(*row)
        )
    lines += [f"not computed: {name}, {why}" for name, why in evaluation.missing.items()]
    lines.append("± is half a 95 % confidence interval, samples being what is drawn")
    return "\n".join(lines)
