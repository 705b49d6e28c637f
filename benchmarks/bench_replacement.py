"""What replacing all MLPs of the demo's model costs, and whether it captions pictures; after `make demo`.

    python benchmarks/bench_replacement.py [--pictures 40]

The pictures are ones that neither the model nor the run ever saw. This is `clt eval --model`, as a table.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "demo"))  # the demo's modules are scripts beside each other, not a package

import shapes  # noqa: E402
from data import write_unseen  # noqa: E402

OUT = ROOT / "demo" / "out"


def main() -> None:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--run", type=Path, default=OUT / "run")
    options.add_argument("--pictures", type=int, default=40)
    asked = options.parse_args()
    dataset = write_unseen(OUT / "unseen", shapes.UNSEEN[9000 : 9000 + asked.pictures])
    command = [
        "eval",
        asked.run,
        "--model",
        OUT / "model",
        "--dataset",
        dataset,
        "--dtype",
        "float32",
        "--json",
    ]
    command += ["--samples", asked.pictures, "--generate", asked.pictures]
    done = subprocess.run(
        [sys.executable, "-m", "clt.cli", *map(str, command)], check=True, stdout=subprocess.PIPE, text=True
    )
    print(table(json.loads(done.stdout)["model"], asked.pictures))


ROWS = {
    "original": "the model's own",
    "transcoder": "replaced by the transcoder",
    "errors": "the same, its errors added: must change nothing",
    "mean": "their means",
    "zero": "nothing",
}


def table(found: dict[str, Any], n_pictures: int) -> str:
    """As Markdown."""
    lines = [
        "| MLPs | cross-entropy, nats | rise | KL | top-1 agreement | captions exactly right |",
        "|---|---|---|---|---|---|",
    ]
    match = found["exact_match"]
    right = {"original": match["original"], "transcoder": match["replaced"]}
    for mode, scores in found["modes"].items():
        cells = [plain(**scores[name]) for name in ("ce", "rise", "kl", "top1")]
        share = right.get(mode)
        sure = None if share is None else 1.96 * (share * (1 - share) / n_pictures) ** 0.5
        cells.append("" if share is None else f"{share:.1%} ± {sure:.1%}")
        lines.append(f"| {ROWS[mode]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plain(mean: float, half_width: float) -> str:
    """To a thousandth; what is smaller, and not 0, by its size."""
    if mean and abs(mean) < 5e-4:
        return f"{mean:.0e}"
    return f"{mean:.3f} ± {half_width:.3f}"


if __name__ == "__main__":
    main()
