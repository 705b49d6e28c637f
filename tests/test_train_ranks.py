"""Many ranks are one process: same weights, same numbers, one layout of checkpoints. In real processes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import write_planted
from safetensors.torch import load_file

from clt.train.checkpoint import checkpoint_folder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.loop import train

STEPS = 50


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of layers."""
    root = tmp_path_factory.mktemp("planted")
    return {n: write_planted(root / str(n), 1500, val=200, layers=n) for n in (3, 5)}


def configure(cache: Path, run: Path, **options: Any) -> TrainConfig:
    structure = {"latents": 40, "n_targets": 3, **options.pop("structure", {})}
    if structure.get("activation", "topk") in ("topk", "batchtopk", "groupmax"):
        structure = {"k": 4, **structure}
    defaults: dict[str, Any] = {"batch_tokens": 61, "lr": 5e-3, "buffer_tokens": 640, "threads": 1}
    defaults |= {"epochs": 9, "steps": STEPS, "dtype": "float64", "lr_warmup_steps": 5}
    return TrainConfig(
        caches=(cache,), run=run, transcoder=TranscoderConfig(**structure), **{**defaults, **options}
    )


def run_ranks(folder: Path, jobs: list[tuple[int, TrainConfig, bool]]) -> None:
    """Train each config with so many ranks, resuming or not."""
    described = [{"world": n, "config": config.to_json(), "resume": resume} for n, config, resume in jobs]
    (folder / "jobs.json").write_text(json.dumps(described))
    script = Path(__file__).with_name("ranked_training.py")
    command = [sys.executable, "-W", "error", str(script), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-6000:]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint_folder(run)
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def require_same(one: Path, many: Path, rtol: float) -> None:
    """Same files, the same numbers in them within rounding, and the same lines of metrics."""
    mine, theirs = tensors(one), tensors(many)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        if tensor.dtype.is_floating_point:
            scale = float(tensor.abs().max())
            torch.testing.assert_close(
                theirs[name], tensor, rtol=rtol, atol=rtol * scale, msg=f"{many} {name}"
            )
        else:
            assert torch.equal(theirs[name], tensor), (many, name)
    for expected, found in zip(lines(one), lines(many), strict=True):
        assert expected.keys() == found.keys()
        for name in expected.keys() - {"tokens_per_s", "stall"}:
            assert found[name] == pytest.approx(expected[name], rel=100 * rtol, abs=1e-12), (many, name)


ADAM8 = {"optimizer": "adam8", "dtype": "float32"}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "dead latents": (2, 5, {"auxk_alpha": 0.1, "dead_latent_penalty": 0.1, "grad_acc_steps": 2}),
    "tied by source": (
        2,
        5,
        {"structure": {"tie": "source", "skip_connection": True}, "optimizer": "signum"},
    ),
    "float32": (2, 5, {"dtype": "float32", "max_grad_norm": 0.05}),
    "tied by target": (3, 5, {"structure": {"tie": "target", "activation": "groupmax"}, "optimizer": "muon"}),
    "jumprelu": (
        3,
        5,
        {"structure": {"activation": "jumprelu"}, "sparsity_coeff": 0.01, "fvu_variance": "batch"},
    ),
    "replicas, batchtopk": (4, 3, {"structure": {"activation": "batchtopk"}, "fvu_variance": "batch"}),
    "replicas, relu": (4, 3, {"structure": {"activation": "relu", "tie": "source"}, "sparsity_coeff": 0.01}),
}
"""name: (ranks, layers, options)"""


def test_weights_of_many_ranks_are_those_of_one(caches: dict[int, Path], tmp_path: Path) -> None:
    """After 50 steps, in float64 to 1e-9; so are the optimiser's state, counters, and lines of metrics."""
    compare(caches, tmp_path, CASES)


def compare(caches: dict[int, Path], root: Path, cases: dict[str, tuple[int, int, dict[str, Any]]]) -> None:
    jobs, pairs = [], []
    for name, (world, layers, options) in cases.items():
        one = configure(caches[layers], root / name / "one", **options)
        many = replace(one, run=root / name / "many")
        train(one)
        jobs.append((world, many, False))
        pairs.append((one, many))
    run_ranks(root, jobs)
    for one, many in pairs:
        require_same(one.run, many.run, 1e-9 if one.dtype == "float64" else 1e-3)
        places = [json.loads((checkpoint_folder(c.run) / "trainer.json").read_text()) for c in (one, many)]
        assert places[0] == places[1]
