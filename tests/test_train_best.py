"""`--save-best`: the checkpoint of the smallest held-out FVU is named and stays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planted import write_planted

from clt.train import checkpoint
from clt.train.checkpoint import checkpoint_folder, load_transcoder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.evaluate import evaluate
from clt.train.loop import open_source, train
from clt.train.report import evaluate_cache


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 1500, val=300)


def configure(cache: Path, run: Path, **options: Any) -> TrainConfig:
    """Twelve steps at a rate that soon makes it worse; a checkpoint every second one."""
    defaults: dict[str, Any] = {"batch_tokens": 100, "threads": 1, "lr": 0.1, "lr_schedule": "constant"}
    defaults |= {"save_every": 2, "steps": 12, "lr_warmup_steps": 10, "save_best": True}
    structure = TranscoderConfig(k=4, latents=40, n_targets=2)
    return TrainConfig(caches=(cache,), run=run, transcoder=structure, **{**defaults, **options})


def scores(config: TrainConfig) -> dict[str, float]:
    """Held-out FVU of every checkpoint on the disk, measured again."""
    held_out = open_source(config, "val")
    steps = sorted(config.run.glob("step-*"))
    return {step.name: float(evaluate(load_transcoder(step), held_out).fvu.mean()) for step in steps}


def test_best_is_the_smallest_and_stays(cache: Path, tmp_path: Path) -> None:
    every = configure(cache, tmp_path / "every", keep=99)
    train(every)
    found = scores(every)
    best = min(found, key=lambda step: found[step])
    assert len(found) == 6
    assert best not in ("step-00000002", "step-00000012"), "the test is to have its best in the middle"
    assert (every.run / "best").read_text() == best
    assert checkpoint_folder(every.run / "best") == every.run / best
    few = configure(cache, tmp_path / "few")
    train(few)
    assert sorted(step.name for step in few.run.glob("step-*")) == [best, "step-00000012"]
    found_by_name, _ = evaluate_cache(few.run / "best", "val", (), 1)
    assert found_by_name["fvu"] == found[best]


def test_a_kill_before_best_is_named_is_made_good(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (configure(cache, tmp_path / name) for name in ("whole", "cut"))
    train(whole)
    best = (whole.run / "best").read_text()
    with monkeypatch.context() as patch:
        named = checkpoint.name_best

        def die(run: Path) -> Path | None:
            if checkpoint_folder(run).name == best:
                raise KeyboardInterrupt
            return named(run)

        patch.setattr(checkpoint, "name_best", die)
        with pytest.raises(KeyboardInterrupt):
            train(cut)
    assert (cut.run / "best").read_text() != best
    train(cut, resume=True)
    assert (cut.run / "best").read_text() == best
    assert sorted(p.name for p in cut.run.glob("step-*")) == sorted(p.name for p in whole.run.glob("step-*"))


def test_without_held_out_tokens_it_is_refused(tmp_path: Path) -> None:
    config = configure(write_planted(tmp_path / "cache", 300), tmp_path / "run")
    with pytest.raises(ValueError, match=r"--save-best: expected held-out tokens; .*val"):
        train(config)
    assert not config.run.exists()
    train(replace(config, save_best=False, steps=1))
    assert not (config.run / "best").exists()
