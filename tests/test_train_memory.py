"""The memory formula against counts of real tensors, and the number that a plan rests on."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_transcoder import SHAPE, make_batch, make_model

from clt.train.memory import (
    llava_shape,
    offload_memory,
    offload_table,
    read_memory,
    read_table,
    step_memory,
    table,
)
from clt.train.optimizer import Optimizer
from clt.train.placement import Offload, zeros_on_host
from clt.train.step import train_step
from clt.train.transcoder import CrossLayerTranscoder


def test_llava_fits_one_device_of_80_gb() -> None:
    """14.2 B parameters in bfloat16 with 8-bit Adam: weights and state alone are 57.4 GB."""
    assert llava_shape().n_parameters == 14_227_472_384
    memory = step_memory(llava_shape(), tokens=4096, dtype="bfloat16", optimizer="adam8")
    assert memory.parameters + memory.optimizer == pytest.approx(57.4e9, rel=0.002)
    assert memory.device == pytest.approx(59.9e9, rel=0.002)
    assert "**59.9**" in table()


def test_the_documented_tables_are_those_of_the_formulas() -> None:
    """And two buffers of LLaVA in int8 are 2 * 8192 * (2 sites * 32 layers * (4096 + 256) + 64) bytes."""
    text = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()
    assert table() in text
    assert offload_table() in text
    assert read_table() in text
    memory = read_memory(32, 4096, "int8", buffer_tokens=8192, batch_tokens=4096, threads=16)
    assert memory.buffers == 2 * 8192 * (2 * 32 * (4096 + 256) + 64)


def test_llava_fits_one_device_of_24_gb_with_its_decoders_away() -> None:
    """2 rooms of 16 decoders, 32 encoders, 4.03 bytes a value; gradients of 16 decoders in float32."""
    memory = offload_memory(llava_shape(), tokens=4096, dtype="bfloat16", optimizer="adam8")
    matrix = 8192 * 4096
    assert memory.away == pytest.approx(392 * matrix * (4 + 8 / 256), rel=1e-6)
    held = (2 * 16 + 32) * matrix * (4 + 8 / 256) + 16 * matrix * 4
    assert held < memory.step.device < held + 0.6e9
    assert memory.step.device < 24e9 - 12e9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", ["none", "source", "target"])
def test_formula_counts_what_is_away_and_the_room_for_it(tie: str, dtype: torch.dtype) -> None:
    """Of real tensors; what is small is counted otherwise."""
    shape = dataclasses.replace(SHAPE, tie=tie, d_model=64, n_latents=256, skip=dtype == torch.float32)
    sites = make_model(shape).float()
    model = CrossLayerTranscoder(shape, sites.inputs, sites.outputs, dtype=dtype)
    optimizer = Optimizer(model, "adam8")
    offload = Offload(model, optimizer, zeros_on_host)
    memory = offload_memory(shape, tokens=9, dtype=str(dtype).removeprefix("torch."), optimizer="adam8")
    away = [part for parts in offload._home.values() for part in parts.values()]
    assert memory.away == pytest.approx(sum(p.numel() * p.element_size() for p in away), rel=0.01)
    stays = [*model.W_enc, *model.b_enc, *model.b_dec]
    on_device = sum(p.numel() * p.element_size() for p in stays) + offload.device_bytes
    state = sum(p.numel() for p in stays) * (2 + 8 / 256)
    assert memory.step.parameters + memory.step.optimizer == pytest.approx(on_device + state, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adam", "adam8", "signum", "muon"])
@pytest.mark.parametrize("tie", ["none", "source", "target"])
def test_formula_counts_weights_and_state(optimizer: str, tie: str) -> None:
    shape = dataclasses.replace(SHAPE, tie=tie, d_model=64, n_latents=128)
    model = make_model(shape).float()
    rule = Optimizer(model, optimizer)
    rule.begin(0, 1e-3)
    train_step(model, [make_batch(9, 0, shape)], rule.apply)
    memory = step_memory(shape, tokens=9, optimizer=optimizer)
    assert memory.parameters == sum(p.numel() * p.element_size() for p in model.parameters())
    state = [t for layer in range(shape.n_layers) for t in rule.state(layer).values()]
    held = sum(t.numel() * t.element_size() for t in state)
    assert memory.optimizer == pytest.approx(held, rel=0.05)  # small vectors count otherwise


def test_gradients_of_one_target_are_held_at_a_time() -> None:
    """Storage of all gradients that a step hands over: one target's decoders, whatever the layers."""
    model, places = make_model(), set()

    def note(side: str, layer: int, grads: dict[str, torch.Tensor]) -> None:
        places.add(grads["W_dec" if side == "decoder" else "W_enc"].untyped_storage().data_ptr())

    train_step(model, [make_batch(9, 0), make_batch(4, 1)], note)
    assert len(places) == 1
    memory = step_memory(SHAPE, tokens=9, dtype="float64")
    assert memory.gradients == max(w.numel() for w in model.W_dec) * 8


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("dtype", "optimizer", "tie"),
    [("float32", "adam", "none"), ("bfloat16", "adam8", "none"), ("float32", "muon", "source")],
)
def test_a_process_takes_what_the_formula_says(dtype: str, optimizer: str, tie: str) -> None:
    """Within 10 %, at SmolLM2's width, as benchmarks/bench_step.py prints it."""
    benchmarks = Path(__file__).parents[1] / "benchmarks"
    case = (576, 2048, dtype, optimizer, tie)
    code = f"import step_memory; print(*step_memory.measured_and_formula(*{case!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=benchmarks, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    measured, formula = map(float, done.stdout.split())
    assert measured == pytest.approx(formula, rel=0.1)
