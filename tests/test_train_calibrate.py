"""Thresholds that keep as many latents as k did."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from planted import write_planted
from test_train_loop import configure

from clt.export.run import export_run
from clt.train.calibrate import calibrate, find_thresholds
from clt.train.checkpoint import load_transcoder
from clt.train.evaluate import evaluate
from clt.train.loop import open_source, train
from clt.train.run_folder import load_config

ACTIVATIONS = ("topk", "batchtopk", "groupmax")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("calibrate") / "c", 3000, val=1000)


@pytest.fixture(scope="module")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    for name in ACTIVATIONS:
        train(configure(cache, folder / name, steps=20, structure={"activation": name}))
    return {name: folder / name for name in ACTIVATIONS}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_l0_is_k_on_the_tokens_that_decided(runs: dict[str, Path], name: str, tmp_path: Path) -> None:
    """To one code, over all tokens of split train; nothing else of the weights changes."""
    calibrate(runs[name], tmp_path / "out", tokens=10**6)
    old, new = load_transcoder(runs[name]), load_transcoder(tmp_path / "out")
    assert new.shape.activation == "jumprelu"
    source = open_source(load_config(runs[name]), "train")
    found = evaluate(new, source)
    assert abs(found.l0 * source.n_tokens - 4 * source.n_tokens).max() <= 2
    assert all(torch.equal(a, b) for a, b in zip(old.W_dec, new.W_dec, strict=True))


def test_before_and_after_are_those_of_eval(runs: dict[str, Path], tmp_path: Path) -> None:
    found = calibrate(runs["topk"], tmp_path / "out")
    source = open_source(load_config(runs["topk"]), "val")
    before, after = (
        evaluate(load_transcoder(runs["topk"]), source),
        evaluate(load_transcoder(tmp_path / "out"), source),
    )
    assert (found.before.fvu == before.fvu).all()
    assert (found.after.fvu == after.fvu).all()
    assert abs(found.after.l0 - found.before.l0).max() < 1.0
    assert (found.after.fvu < 1.5 * found.before.fvu).all()


def test_the_number_of_batches_does_not_matter(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, model = load_config(runs["topk"]), load_transcoder(runs["topk"])
    whole = find_thresholds(model, open_source(config, "train"), 3000, config)
    monkeypatch.setattr("clt.train.calibrate.BATCH_TOKENS", 70)
    torch.testing.assert_close(find_thresholds(model, open_source(config, "train"), 3000, config), whole)


def test_what_comes_out_can_be_exported(runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="clt calibrate"):
        export_run(runs["topk"], tmp_path / "no", "circuit-tracer")
    calibrate(runs["topk"], tmp_path / "out")
    export_run(tmp_path / "out", tmp_path / "ct", "circuit-tracer")
    assert (tmp_path / "ct" / "config.yaml").exists()


def test_the_command(runs: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "clt.cli", "calibrate", str(runs["batchtopk"]), str(tmp_path / "out")]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.keys() == {"run", "thresholds", "before", "after"}
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 2
    assert "exists; choose another folder" in again.stderr
    jumps = [*command[:4], str(tmp_path / "out"), str(tmp_path / "more")]
    done = subprocess.run(jumps, capture_output=True, text=True)
    assert "expected topk, batchtopk, groupmax, found jumprelu" in done.stderr
