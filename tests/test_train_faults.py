"""A kill or a full disk at any moment of a run: what was saved stays; finishing gives the same weights."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from killed_training import Moments
from planted import write_planted
from safetensors import SafetensorError
from safetensors.torch import load_file

from clt.train import checkpoint
from clt.train.checkpoint import load_transcoder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.loop import train
from clt.train.reader import Reader

STEPS = 6


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 1000)


def configure(cache: Path, run: Path, **options: Any) -> TrainConfig:
    """Six steps of two micro-batches over more than one epoch, a checkpoint every second step."""
    defaults: dict[str, Any] = {"batch_tokens": 100, "grad_acc_steps": 2, "epochs": 2, "steps": STEPS}
    defaults |= {"buffer_tokens": 320, "threads": 1, "lr": 5e-3, "save_every": 2}
    structure = TranscoderConfig(k=4, latents=40, n_targets=2)
    return TrainConfig(caches=(cache,), run=run, transcoder=structure, **{**defaults, **options})


def saved(run: Path) -> dict[str, bytes]:
    """Every file of the last checkpoint: weights, the optimiser's state, counters, place of the reader."""
    folder = checkpoint.checkpoint_folder(run)
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def kill_and_resume(cache: Path, run: Path, moments: tuple[int, int, int], **options: Any) -> set[int]:
    """Each run of `killed_training` ended as the whole one did; the moments that were hit."""
    config = configure(cache, run, **options)
    train(config)
    script = Path(__file__).with_name("killed_training.py")
    command = [sys.executable, str(script), str(run), *map(str, moments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hit = set()
    for line in map(json.loads, done.stdout.splitlines()):
        if line["ended"] == -9:
            hit.add(line["at"])
            other = run.with_name(f"{run.name}-{line['at']}")
            assert line["resumed"] == 0, (line, done.stderr)
            assert saved(other) == saved(run), line
            assert sorted(p.name for p in other.glob("*step-*")) == [f"step-{STEPS:08d}"], line
        else:
            assert line["ended"] == 0, (line, done.stderr)
    return hit


def test_killed_anywhere_and_resumed_equals_uninterrupted(cache: Path, tmp_path: Path) -> None:
    """A few moments of each sort, for Adam."""
    hit = kill_and_resume(cache, tmp_path / "run", (3, 29, 400))
    assert len(hit) >= 4


def test_killed_and_resumed_with_rounded_weights_and_muon(cache: Path, tmp_path: Path) -> None:
    hit = kill_and_resume(cache, tmp_path / "run", (20, 60, 400), optimizer="muon", dtype="bfloat16")
    assert len(hit) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"optimizer": "adam8", "dtype": "bfloat16", "keep": 1}, {"optimizer": "signum"}]
)
def test_killed_at_every_moment(cache: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    hit = kill_and_resume(cache, tmp_path / "run", (0, 1, 10_000), **options)
    assert hit == set(range(len(hit)))
    assert len(hit) > 100


def full(name: str, *args: Any) -> None:
    """What a full disk does: half of the file, then an error; safetensors tells it in its own words."""
    if name == "save_file":
        args[1].write_bytes(b"\x00" * 7)
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")


@pytest.mark.parametrize("nth", [0, 3, 6])
def test_a_full_disk_leaves_the_previous_checkpoint(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nth: int
) -> None:
    """The second save finds no room at its first, a middle or its last file of tensors."""
    whole, cut = (configure(cache, tmp_path / name, save_every=2) for name in ("whole", "cut"))
    train(whole)
    with monkeypatch.context() as patch:
        watched = Moments(7 + nth, full)
        patch.setattr(checkpoint, "save_file", checkpoint.save_file)
        watched.watch(checkpoint, "save_file")
        with pytest.raises(OSError, match="No space left") as caught:
            train(cut)
    assert caught.value.errno == errno.ENOSPC
    assert sorted(path.name for path in cut.run.glob("*step-*")) == ["step-00000002"]
    load_transcoder(cut.run)
    train(cut, resume=True)
    assert saved(cut.run) == saved(whole.run)


def test_a_step_that_was_saved_but_not_named_is_made_again(cache: Path, tmp_path: Path) -> None:
    """A kill between the two left step 4 in place while `latest` says 2; stopping at 3 must not lose 3."""
    config = configure(cache, tmp_path / "run", keep=9)
    train(config)
    (config.run / "latest").write_text("step-00000002")
    short = replace(config, keep=1)
    read = Reader.next
    count = 0

    def stop_after_one(self: Reader, size: int) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            from clt.stopping import StopRequested

            StopRequested.requested = True
        return read(self, size)

    from clt.stopping import StopRequested

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "next", stop_after_one)
        try:
            with pytest.raises(StopRequested):
                train(short, resume=True)
        finally:
            StopRequested.requested = False
    assert (config.run / "latest").read_text() == "step-00000003"
    assert [path.name for path in config.run.glob("step-*")] == ["step-00000003"]
    assert load_file(config.run / "step-00000003" / "trainer.safetensors")
    assert torch.isfinite(load_transcoder(config.run).W_enc[0]).all()
