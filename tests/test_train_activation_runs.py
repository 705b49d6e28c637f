"""Runs with every activation: what they log, that they resume exactly and can be evaluated; and refusals."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import LAYERS, write_planted
from safetensors.torch import load_file

from clt.train.checkpoint import load_transcoder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.evaluate import evaluate
from clt.train.loop import open_source, train
from clt.train.plan import annealed
from clt.train.run_folder import load_config

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "topk": {"auxk_alpha": 1 / 32, "k_anneal_steps": 3},
    "batchtopk": {"auxk_alpha": 1 / 32, "k_anneal_steps": 3, "grad_acc_steps": 2},
    "groupmax": {"dead_latent_penalty": 1e-3},
    "relu": {"sparsity_coeff": 1e-3},
    "jumprelu": {"sparsity_coeff": 1e-3, "dead_latent_penalty": 1e-3},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 1200, val=200)


def configure(cache: Path, run: Path, activation: str, **options: Any) -> TrainConfig:
    k = None if activation in ("relu", "jumprelu") else (4, 5, 4) if activation == "topk" else 4
    structure = TranscoderConfig(activation=activation, k=k, latents=40, n_targets=3)
    defaults: dict[str, Any] = {
        "batch_tokens": 60,
        "lr": 5e-3,
        "buffer_tokens": 640,
        "threads": 1,
        "steps": 6,
    }
    return TrainConfig(caches=(cache,), run=run, transcoder=structure, **{**defaults, **options})


def weights(run: Path) -> dict[str, torch.Tensor]:
    files = sorted((run / "step-00000006").rglob("*.safetensors"))
    return {f"{p.parent.name}/{p.name}:{name}": t for p in files for name, t in load_file(p).items()}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_resumes_exactly(
    cache: Path, tmp_path: Path, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds, running thresholds and the schedules of k and sparsity go on where they were."""
    monkeypatch.setattr("clt.train.plan.DEAD_AFTER_TOKENS", 120)  # so that some latents are dead at once
    options = {**ACTIVATIONS[activation], "save_every": 2, "keep": 9}
    whole, cut = (configure(cache, tmp_path / name, activation, **options) for name in ("whole", "cut"))
    train(whole)
    train(cut)
    (cut.run / "latest").write_text("step-00000004")
    train(cut, resume=True)
    first, second = weights(whole.run), weights(cut.run)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert load_config(whole.run) == whole
    lines = [json.loads(line) for line in (whole.run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert ("sparsity" in lines[-1]) == ("sparsity_coeff" in options)
    assert ("auxk" in lines[-1]) == ("auxk_alpha" in options)
    expected = {"topk": [40, 28.3, 16.3], "batchtopk": [40, 28, 16]}.get(activation)
    if expected:
        assert [line["k"] for line in lines[:3]] == pytest.approx(expected, abs=0.4)
        assert lines[-1]["k"] == pytest.approx(13 / 3 if activation == "topk" else 4)
    found = evaluate(load_transcoder(whole.run), open_source(whole, "val"))
    assert 0 < found.fvu.mean() < 1.5
    assert (found.l0 > 0).all()
    if activation == "groupmax":
        assert (found.l0 <= 4).all()


def test_sparsity_makes_l0_smaller(cache: Path, tmp_path: Path) -> None:
    found = {}
    for coefficient in (0.0, 0.1):
        config = configure(
            cache, tmp_path / str(coefficient), "jumprelu", sparsity_coeff=coefficient, steps=None, epochs=4
        )
        train(config)
        found[coefficient] = evaluate(load_transcoder(config.run), open_source(config, "val")).l0
    assert (found[0.1] < 0.8 * found[0.0]).all()


def test_k_falls_linearly() -> None:
    assert [annealed(3, step, 3, 100) for step in range(5)] == [30, 21, 12, 3, 3]
    assert annealed(30, 0, 5, 100) == 100
    assert annealed(30, 0, 0, 100) == 30


@pytest.mark.parametrize(
    ("structure", "options", "message"),
    [
        ({"activation": "relu", "k": 3}, {}, "--k: relu has no k"),
        ({"activation": "gelu"}, {}, "--activation: expected one of topk"),
        ({"activation": "jumprelu"}, {}, "--sparsity-coeff: jumprelu needs one"),
        ({}, {"sparsity_coeff": 1.0}, "--sparsity-coeff: topk is sparse by --k"),
        ({"bandwidth": 1.0}, {}, "--bandwidth: expected more than 0, with --activation jumprelu"),
        ({"activation": "groupmax"}, {"k_anneal_steps": 3}, "--k-anneal-steps: expected --activation topk"),
        ({}, {"auxk_alpha": -1.0}, "--auxk-alpha: expected at least 0"),
        ({}, {"epochs": math.inf}, "--epochs: expected more than 0 and finite, found inf"),
        ({}, {"lr": math.inf}, "--lr: expected more than 0 and finite, found inf"),
        ({}, {"auxk_alpha": math.nan}, "--auxk-alpha: expected at least 0 and finite, found nan"),
        ({"activation": "relu"}, {"sparsity_coeff": math.nan}, "--sparsity-coeff: expected at least 0"),
        ({}, {"steps": 0}, "--steps: expected at least 1, found 0"),
        ({}, {"tokens": 0}, "--tokens: expected at least 1, found 0"),
        ({}, {"lr_warmup_steps": -1}, "--lr-warmup-steps: expected at least 0 and finite, found -1"),
        ({}, {"dead_after_tokens": 0}, "--dead-after-tokens: expected at least 1"),
        ({}, {"compile": True}, "--compile is for --optimizer adam8; found adam"),
        ({"k": (3, 0, 1)}, {}, "--k: expected at least 1"),
        ({"k": 50, "latents": 40}, {}, "--latents: expected at least k = 50"),
    ],
)
def test_options_without_meaning_are_refused(
    structure: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(caches=(), run=Path(), transcoder=TranscoderConfig(**structure), **options)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({"k": (3, 4)}, f"--k: expected one number, or one for each of {LAYERS} layers"),
        ({"activation": "groupmax", "k": 7, "latents": 40}, "groupmax expects a divisor of the 40 latents"),
    ],
)
def test_k_must_fit_the_layers(cache: Path, tmp_path: Path, structure: dict[str, Any], message: str) -> None:
    config = TrainConfig(caches=(cache,), run=tmp_path / "r", transcoder=TranscoderConfig(**structure))
    with pytest.raises(ValueError, match=message):
        train(config)
