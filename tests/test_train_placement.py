"""Offloaded decoders: the same numbers, brought one layer ahead, at home between steps, no file left."""

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import write_planted
from test_train_loop import configure, stop_after, weights
from tiny_transcoder import SHAPE, make_batch, make_model

from clt.cli import main
from clt.stopping import StopRequested
from clt.train import placement
from clt.train.loop import train
from clt.train.optimizer import Optimizer
from clt.train.placement import Offload, zeros_on_disk, zeros_on_host
from clt.train.step import train_step
from clt.train.transcoder import CrossLayerTranscoder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 1000, val=100)


def require_same(one: Path, other: Path) -> None:
    first, second = (weights(run / (run / "latest").read_text()) for run in (one, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    "options",
    [
        {"offload": "host"},
        {"offload": "disk", "optimizer": "adam8", "dtype": "bfloat16", "latents": 180},
        {"offload": "host", "optimizer": "muon", "tie": "source", "skip_connection": True},
        {"offload": "disk", "optimizer": "signum", "tie": "target", "skip_connection": True},
        {
            "offload": "host",
            "activation": "jumprelu",
            "k": None,
            "sparsity_coeff": 1e-3,
            "auxk_alpha": 0.03,
            "dead_latent_penalty": 1e-5,
            "tie": "source",
        },
    ],
)
def test_offloaded_runs_are_the_same_bit_for_bit(cache: Path, tmp_path: Path, options: Any) -> None:
    """Weights, the optimiser's state and held-out numbers, for each rule, tie and kind of loss."""
    names = ("tie", "skip_connection", "activation", "k", "latents")
    structure = {name: options[name] for name in names if name in options}
    rest = {name: value for name, value in options.items() if name not in (*names, "offload")}
    plain = configure(cache, tmp_path / "plain", steps=4, structure=structure, grad_acc_steps=2, **rest)
    away = replace(plain, run=tmp_path / "away", offload=options["offload"])
    assert train(plain).held_out == train(away).held_out
    require_same(plain.run, away.run)


def test_a_run_goes_on_wherever_its_decoders_are(cache: Path, tmp_path: Path) -> None:
    """Begun on the device, stopped, resumed from the disk."""
    whole = configure(cache, tmp_path / "whole", steps=4)
    cut = replace(whole, run=tmp_path / "cut")
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequested, "check", stop_after(2))
        with pytest.raises(StopRequested):
            train(cut)
    train(replace(cut, offload="disk"), resume=True)
    require_same(whole.run, cut.run)


class Watched(Offload):
    """Notes what is asked of it, and of the thread that copies."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.events: list[str] = []
        copy, homes = self._mover.copy, [parts["W_dec"].data_ptr() for parts in self._home.values()]

        def noted(pairs: Any) -> Any:
            old, new = (tensor.data_ptr() for tensor in pairs[0])
            came = old in homes
            self.events.append(f"{'come' if came else 'go'} {homes.index(old if came else new)}")
            return copy(pairs)

        self._mover.copy = noted  # type: ignore[method-assign]


def at_work(model: CrossLayerTranscoder) -> list[int]:
    return [weight.data_ptr() for weight in model.W_dec]


@pytest.mark.parametrize("tie", ["none", "source"])
def test_layers_come_one_ahead_and_go_at_once(tie: str) -> None:
    """The next layer is on its way before this one is decoded. Tied by source, n_targets are at work."""
    model = make_model(replace(SHAPE, tie=tie))
    optimizer = Optimizer(model, "adam")
    watched = Watched(model, optimizer, zeros_on_host)
    home, seen = at_work(model), []

    def apply(side: str, layer: int, grads: dict[str, torch.Tensor]) -> None:
        optimizer.apply(side, layer, grads)
        if side == "decoder":
            watched.events.append(f"use {layer}")
            seen.append(at_work(model)[layer] != home[layer])

    optimizer.begin(0, 1e-3)
    before = [weight.clone() for weight in model.W_dec]
    train_step(model, [make_batch(9, 0)], apply, placement=watched)
    expected = {
        "none": "come 0, come 1, use 0, go 0, come 2, use 1, go 1, come 3, use 2, go 2, use 3, go 3",
        "source": "come 0, come 1, come 2, come 3, use 0, go 0, use 1, go 1, use 2, go 2, use 3, go 3",
    }
    assert ", ".join(watched.events) == expected[tie]
    assert all(seen)
    assert at_work(model) == home
    assert not any(torch.equal(old, new) for old, new in zip(before, model.W_dec, strict=True))


def test_room_on_the_device_is_that_of_two_layers() -> None:
    """Weights and both moments, in float64."""
    model = make_model()
    offload = Offload(model, Optimizer(model, "adam"), zeros_on_host)
    assert offload.device_bytes == 2 * 3 * max(weight.numel() for weight in model.W_dec) * 8


def test_nothing_stays_on_the_disk(tmp_path: Path) -> None:
    zeros = zeros_on_disk(tmp_path / "new")
    tensor = zeros((3, 5), torch.float32)
    assert list((tmp_path / "new").iterdir()) == []
    assert not tensor.any()
    mapped = (Path("/proc/self/maps")).read_text()
    assert f"{tmp_path}/new/.offload-" in mapped


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def refuse(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(placement.os, "posix_fallocate", refuse)
    return


@pytest.mark.usefixtures("full")
def test_a_full_disk_is_one_line(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--run-name", "x", "--out", f"{tmp_path}/runs/x", "--offload", "disk", "--latents", "40"]
    monkeypatch.setattr("sys.argv", ["clt", "train", str(cache), *options])
    with pytest.raises(SystemExit, match="2"):
        main()
    said = capsys.readouterr().err
    assert said.startswith(f"error: the disk is full ({tmp_path / 'runs'}); ")
    assert len(said.splitlines()) == 1
    assert os.listdir(tmp_path / "runs") == []
