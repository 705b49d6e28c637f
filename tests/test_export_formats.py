"""Exports against our own forward pass: each is decoded here by the rule that its package documents."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import save_run
from torch import Tensor

from clt.export.run import FORMATS, export_run
from clt.train.shape import Shape
from clt.train.transcoder import CrossLayerTranscoder

CROSS = Shape(layers=(0, 1, 2, 3), d_model=16, n_latents=40, k=None, n_targets=3, activation="relu")
JUMPS = replace(CROSS, activation="jumprelu", bandwidth=2.0)
BATCH = replace(CROSS, activation="batchtopk", k=4)
TOPK = replace(CROSS, activation="topk", k=(3, 4, 5, 6))
ALONE = replace(CROSS, n_targets=1, skip=True)


def run_and_tokens(folder: Path, shape: Shape) -> tuple[CrossLayerTranscoder, Tensor]:
    return save_run(folder, shape), 2 * torch.randn(50, shape.n_layers, shape.d_model)


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())


def jump(pre: Tensor, threshold: Tensor | None) -> Tensor:
    """circuit-tracer's and SAELens's activation."""
    return pre.relu() if threshold is None else pre * (pre > threshold)


@pytest.mark.parametrize(
    "shape", [CROSS, JUMPS, BATCH, replace(JUMPS, tie="source"), replace(JUMPS, tie="target")]
)
def test_circuit_tracer_cross_layer(tmp_path: Path, shape: Shape) -> None:
    model, x = run_and_tokens(tmp_path / "run", shape)
    export_run(tmp_path / "run", tmp_path / "out", "circuit-tracer")
    layers = range(shape.n_layers)
    y = torch.zeros_like(x)
    for source in layers:
        encoder = load_file(tmp_path / "out" / f"W_enc_{source}.safetensors")
        decoder = load_file(tmp_path / "out" / f"W_dec_{source}.safetensors")[f"W_dec_{source}"]
        assert decoder.shape == (shape.n_latents, shape.n_layers - source, shape.d_model)
        assert not decoder[:, shape.n_targets :].any()
        pre = x[:, source] @ encoder[f"W_enc_{source}"].T + encoder[f"b_enc_{source}"]
        codes = jump(pre, encoder.get(f"threshold_{source}"))
        assert_close(codes, model.encode(x)[:, source].detach())
        y[:, source] += encoder[f"b_dec_{source}"]
        y[:, source:] += torch.einsum("tf,fod->tod", codes, decoder)
    assert_close(y, model(x).detach())
    lines = (tmp_path / "out" / "config.yaml").read_text().splitlines()
    assert lines[0] == "model_kind: cross_layer_transcoder"
    assert "feature_input_hook: mlp.hook_in" in lines


def test_circuit_tracer_transcoder_set(tmp_path: Path) -> None:
    model, x = run_and_tokens(tmp_path / "run", replace(ALONE, activation="jumprelu", bandwidth=2.0))
    export_run(tmp_path / "run", tmp_path / "out", "circuit-tracer")
    for layer in range(x.shape[1]):
        t = load_file(tmp_path / "out" / f"layer_{layer}.safetensors")
        codes = jump(x[:, layer] @ t["W_enc"].T + t["b_enc"], t["activation_function.threshold"])
        y = codes @ t["W_dec"] + t["b_dec"] + x[:, layer] @ t["W_skip"].T
        assert_close(y, model(x)[:, layer].detach())
    assert "model_kind: transcoder_set" in (tmp_path / "out" / "config.yaml").read_text()


def test_what_is_zero_takes_no_room(tmp_path: Path) -> None:
    """The decoders beyond the band are holes: the file is longer than what it occupies."""
    shape = replace(CROSS, layers=tuple(range(12)), d_model=1024, n_latents=8, n_targets=2)
    save_run(tmp_path / "run", shape)
    export_run(tmp_path / "run", tmp_path / "out", "circuit-tracer")
    stat = os.stat(tmp_path / "out" / "W_dec_0.safetensors")
    assert stat.st_size > 8 * 12 * 1024 * 4
    assert stat.st_blocks * 512 < 0.5 * stat.st_size


@pytest.mark.parametrize("shape", [JUMPS, replace(ALONE, activation="batchtopk", k=4), ALONE])
def test_sae_lens(tmp_path: Path, shape: Shape) -> None:
    """Activations are ours; outputs too where there is one target."""
    model, x = run_and_tokens(tmp_path / "run", shape)
    export_run(tmp_path / "run", tmp_path / "out", "sae-lens")
    for layer in range(shape.n_layers):
        folder = tmp_path / "out" / f"layer_{layer}"
        t = load_file(folder / "sae_weights.safetensors")
        codes = jump((x[:, layer] @ t["W_enc"] + t["b_enc"]), t.get("threshold"))
        assert_close(codes, model.encode(x)[:, layer].detach())
        config = json.loads((folder / "cfg.json").read_text())
        assert config["architecture"].startswith("jumprelu_") == ("threshold" in t)
        if shape.n_targets == 1:
            y = codes @ t["W_dec"] + t["b_dec"] + x[:, layer] @ t["W_skip"].T
            assert_close(y, model(x)[:, layer].detach())


@pytest.mark.parametrize(
    "shape", [ALONE, replace(TOPK, n_targets=1), replace(TOPK, n_targets=1, k=5, activation="groupmax")]
)
def test_sparsify(tmp_path: Path, shape: Shape) -> None:
    model, x = run_and_tokens(tmp_path / "run", shape)
    export_run(tmp_path / "run", tmp_path / "out", "sparsify")
    for layer in range(shape.n_layers):
        folder = tmp_path / "out" / f"layers.{layer}.mlp"
        t, config = load_file(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text())
        pre = (x[:, layer] @ t["encoder.weight"].T + t["encoder.bias"]).relu()
        codes = torch.zeros_like(pre)
        if config["activation"] == "topk":
            codes.scatter_(1, *reversed(pre.topk(config["k"], dim=1)))
        else:
            values, inside = pre.view(len(pre), config["k"], -1).max(dim=2)
            codes.scatter_(1, inside + torch.arange(config["k"]) * (pre.shape[1] // config["k"]), values)
        y = codes @ t["W_dec"] + t["b_dec"]
        if config["skip_connection"]:
            y += x[:, layer] @ t["W_skip"].mT
        assert_close(y, model(x)[:, layer].detach())


@pytest.mark.parametrize("shape", [CROSS, JUMPS, BATCH, TOPK, replace(TOPK, tie="target")])
def test_clt_training(tmp_path: Path, shape: Shape) -> None:
    model, x = run_and_tokens(tmp_path / "run", shape)
    export_run(tmp_path / "run", tmp_path / "out", "clt-training")
    y = torch.zeros_like(x)
    for source in range(shape.n_layers):
        folder = tmp_path / "out" / f"layers.{source}.mlp"
        t, config = load_file(folder / "sae.safetensors"), json.loads((folder / "cfg.json").read_text())
        pre = (x[:, source] @ t["encoder.weight"].T + t["encoder.bias"]).relu()
        values, places = pre.topk(config["k"], dim=1)
        for offset in range(config["n_targets"]):
            codes = torch.zeros_like(pre).scatter_(
                1, places, values + t[f"post_encs.{offset}"][places] * (values > 0)
            )
            y[:, source + offset] += codes @ t[f"W_decs.{offset}"] + t[f"b_decs.{offset}"]
    assert_close(y, model(x).detach())


REFUSED = [
    ("circuit-tracer", TOPK, "clt calibrate"),
    ("circuit-tracer", replace(JUMPS, skip=True), "no skip connection"),
    ("circuit-tracer", replace(JUMPS, layers=(1, 2, 3, 4)), "counts layers from 0"),
    ("sae-lens", TOPK, "clt calibrate"),
    ("sparsify", replace(TOPK), "per-layer"),
    ("sparsify", replace(JUMPS, n_targets=1), "no jumprelu"),
    ("clt-training", replace(JUMPS, skip=True), "skip"),
    ("pickle", JUMPS, "expected one of circuit-tracer"),
]


@pytest.mark.parametrize(("name", "shape", "words"), REFUSED)
def test_what_a_format_cannot_hold_is_refused_and_nothing_is_written(
    tmp_path: Path, name: str, shape: Shape, words: str
) -> None:
    save_run(tmp_path / "run", shape)
    with pytest.raises(ValueError, match=words):
        export_run(tmp_path / "run", tmp_path / "out", name)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_leaves_no_half_export(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path / "run", replace(CROSS, n_targets=1))

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space left"):
        export_run(tmp_path / "run", tmp_path / "out", name)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
