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


def table(found: dict[str, Any], n_pictures: int) -> str:
    """As Markdown."""
    lines = ["| MLPs | cross-entropy | rise | KL | top-1 agreement |", "|---|---|---|---|---|"]
    for mode, scores in found["modes"].items():
        cells = [
            f"{scores[n]['mean']:.3f} ± {scores[n]['half_width']:.3f}" for n in ("ce", "rise", "kl", "top1")
        ]
        lines.append(f"| {mode} | {' | '.join(cells)} |")
    match = found["exact_match"]
    lines += [
        "",
        f"Captions exactly right on {n_pictures} unseen pictures: {match['original']:.1%} with the model's ",
    ]
    lines[-1] += f"own MLPs, {match['replaced']:.1%} with all of them replaced."
    return "\n".join(lines)


if __name__ == "__main__":
    main()
