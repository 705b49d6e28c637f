"""The demo: a real language model inside a real LLaVA, from pictures and prose to a held-out score.

    python demo/run.py            about 4 minutes on two cores; everything goes into demo/out

Every stage is the command that a user would type.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

OUT = Path(__file__).with_name("out")
MODEL, DATA, CACHE, RUN = OUT / "model", OUT / "data", OUT / "shapes.cache", OUT / "run"
TOKENS = 30_720
EXCLUDE = "bos,sink"
HARVEST = [
    *("harvest", str(MODEL), str(DATA / "train.jsonl"), str(CACHE)),
    *("--tokens", str(TOKENS), "--val-fraction", "0.1", "--window", "4096", "--batch-tokens", "2048"),
    *("--dtype", "float32"),  # few CPUs compute in bfloat16
]
TRAIN = [
    *("train", str(CACHE), "--run-name", "demo", "--out", str(RUN), "--exclude", EXCLUDE),
    *("--n-targets", "16", "--k", "32", "--expansion-factor", "2"),
    *("--batch-tokens", "512", "--epochs", "2", "--lr", "2e-3", "--lr-warmup-steps", "10"),
]


def main() -> None:
    seconds: dict[str, float] = {}
    began = time.monotonic()
    _stage("build", seconds, [sys.executable, str(Path(__file__).with_name("build.py")), str(OUT)])
    _stage("harvest", seconds, _clt(HARVEST))
    info = json.loads(_output(_clt(["info", str(CACHE), "--json"])))
    _stage("verify", seconds, _clt(["verify", str(CACHE), "--full"]))
    resume = ["--resume"] if RUN.exists() else []
    _stage("train", seconds, _clt([*TRAIN, *resume]))
    started = time.monotonic()
    score = json.loads(_output(_clt(["eval", str(RUN), "--json"])))
    seconds["eval"] = time.monotonic() - started
    print(table(info, score, seconds, time.monotonic() - began))


def table(info: dict[str, Any], score: dict[str, Any], seconds: dict[str, float], total: float) -> str:
    splits, noise = info["splits"], info["noise_fvu"]
    kinds = ", ".join(f"{n} {kind}" for kind, n in splits["train"]["kinds"].items())
    rows = {
        "tokens": f"{splits['train']['tokens']} train ({kinds}), {splits['val']['tokens']} held out",
        "cache": f"{info['bits_per_value']:.2f} bits a value, bf16 / {info['ratio_to_bf16']:.2f}",
        "noise of the codes": f"FVU {_mean(noise['mlp_in']):.1e} (in), {_mean(noise['mlp_out']):.1e} (out)",
        "held-out FVU": f"**{score['fvu']:.3f}**, mean of {len(info['layers'])} layers",
        "held-out FVU by kind": ", ".join(f"{k} {v:.3f}" for k, v in score["fvu_kind"].items()),
        "L0, dead latents": f"{score['l0']:.1f} of {2 * info['d_model']}, {score['dead']:.1%}",
        "seconds": ", ".join(f"{name} {s:.0f}" for name, s in seconds.items()) + f"; {total:.0f} in all",
    }
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {text} |" for name, text in rows.items())])


def _stage(name: str, seconds: dict[str, float], command: list[str]) -> None:
    began = time.monotonic()
    print(f"$ {' '.join(command[1:])}", file=sys.stderr, flush=True)
    if subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(f"error: the demo's stage {name} failed; its message is above")
    seconds[name] = time.monotonic() - began


def _output(command: list[str]) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def _clt(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "clt.cli", *arguments]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
