"""Results as text for a terminal."""

from pathlib import Path
from typing import Any

from .checkpoint import checkpoint_folder, load_transcoder
from .evaluate import Evaluation, evaluate
from .loop import open_source
from .run_folder import load_config


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


def render_evaluation(evaluation: Evaluation, layers: tuple[int, ...]) -> str:
    """Held-out numbers: totals, by kind, by offset, by layer."""
    lines = [
        f"{evaluation.tokens} tokens: FVU {evaluation.fvu.mean():.4f} (mean over layers), "
        f"L0 {evaluation.l0.mean():.1f}, dead {evaluation.dead.mean():.1%}",
        "FVU by kind     " + ", ".join(f"{k} {v.mean():.4f}" for k, v in evaluation.fvu_kind.items()),
        "FVU without an offset (target - source)",
        "                " + ", ".join(f"{o}: {v:.4f}" for o, v in evaluation.fvu_without_offset.items()),
        "layer      FVU      L0    dead",
    ]
    for row in zip(layers, evaluation.fvu, evaluation.l0, evaluation.dead, strict=True):
        lines.append("{:>5}   {:.4f}  {:>6.1f}  {:>6.1%}".format(*row))
    return "\n".join(lines)
