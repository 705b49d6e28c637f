"""Results as text for a terminal."""

from .evaluate import Evaluation


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
