"""Finetuning: what a run has is kept, what is new starts fresh, what has no place is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import write_planted

from clt.cache_format import open_cache
from clt.train.checkpoint import load_transcoder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.evaluate import evaluate
from clt.train.finetune import start_from
from clt.train.loop import open_source, train
from clt.train.run_folder import load_config
from clt.train.transcoder import CrossLayerTranscoder, new_transcoder


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two of other tokens, and so of other statistics."""
    folder = tmp_path_factory.mktemp("planted")
    return tuple(write_planted(folder / str(seed), 1000, seed=seed) for seed in (0, 1))  # type: ignore[return-value]


def configure(cache: Path, run: Path, **options: Any) -> TrainConfig:
    structure = {"k": 4, "latents": 40, "n_targets": 3, **options.pop("structure", {})}
    defaults: dict[str, Any] = {
        "batch_tokens": 100,
        "lr": 5e-3,
        "buffer_tokens": 640,
        "threads": 2,
        "steps": 5,
    }
    transcoder = TranscoderConfig(**structure)
    return TrainConfig(caches=(cache,), run=run, transcoder=transcoder, **{**defaults, **options})


def begin(config: TrainConfig) -> CrossLayerTranscoder:
    """A fresh model of these settings, with other random numbers than the run's."""
    return new_transcoder(config.transcoder, open_source(config, "train"), torch.float32, seed=5)


def activations(cache: Path) -> torch.Tensor:
    return torch.from_numpy(open_cache(cache)["train"].read("mlp_in", stop=200))


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("tie", ["none", "source", "target"])
def test_the_same_structure_is_the_same_function(
    caches: tuple[Path, Path], tmp_path: Path, tie: str, skip: bool
) -> None:
    """Bit for bit, on another cache with other statistics; a new skip starts at zero."""
    old = configure(caches[0], tmp_path / "old", structure={"tie": tie, "skip_connection": skip})
    train(old)
    new = configure(caches[1], tmp_path / "new", structure={"tie": tie, "skip_connection": True})
    model, x = begin(new), activations(caches[1])
    expected = load_transcoder(old.run)(x)
    assert not torch.equal(model(x), expected)
    notes = start_from(model, old.run)
    assert torch.equal(model(x), expected)
    assert any("keep its means and scales" in note for note in notes)


def test_more_targets_and_layers_begin_as_the_run(caches: tuple[Path, Path], tmp_path: Path) -> None:
    """Layers 0 and 2 become 0, 1 and 2: outputs of the old layers are what they were; the rest is fresh."""
    old = configure(caches[0], tmp_path / "old", layers="0,2", structure={"n_targets": 2})
    train(old)
    model = begin(configure(caches[0], tmp_path / "new"))
    fresh = {name: p.clone() for name, p in model.named_parameters()}
    notes = start_from(model, old.run)
    x = activations(caches[0])
    assert torch.equal(model(x)[:, [0, 2]], load_transcoder(old.run)(x[:, [0, 2]]))
    kept = {"W_enc.0", "W_enc.2", "b_enc.0", "b_enc.2", "b_dec.0", "b_dec.2", "W_dec.0", "W_dec.2"}
    assert {name for name, p in model.named_parameters() if not torch.equal(p, fresh[name])} == kept
    assert model.W_dec[2][[0, 2]].any(dim=(1, 2)).all()
    assert not model.W_dec[2][1].any()
    assert "fresh: layers [1], 3 pairs of layers" in notes[0]


def test_another_activation_is_told(caches: tuple[Path, Path], tmp_path: Path) -> None:
    """Weights are kept, thresholds have no place; the user is told that codes will be others."""
    jumps = {"activation": "jumprelu", "k": None}
    old = configure(caches[0], tmp_path / "old", structure=jumps, sparsity_coeff=0.01)
    train(old)
    notes = start_from(begin(configure(caches[0], tmp_path / "new")), old.run)
    assert any("activation is topk, and was jumprelu" in note and "thresholds" in note for note in notes)
    assert not any("activation is" in note for note in start_from(begin(old), old.run))


@pytest.mark.parametrize("tie", ["source", "target"])
def test_more_targets_of_tied_decoders_change_the_function_and_say_so(
    caches: tuple[Path, Path], tmp_path: Path, tie: str
) -> None:
    old = configure(caches[0], tmp_path / "old", structure={"tie": tie, "n_targets": 1})
    train(old)
    model = begin(configure(caches[0], tmp_path / "new", structure={"tie": tie}))
    assert any(f"--tie {tie}: 3 fresh pairs of layers use decoders" in n for n in start_from(model, old.run))
    assert all(torch.equal(a, b) for a, b in zip(model.W_dec, load_transcoder(old.run).W_dec, strict=True))


def test_what_has_no_place_is_refused(caches: tuple[Path, Path], tmp_path: Path) -> None:
    old = configure(caches[0], tmp_path / "old", structure={"skip_connection": True})
    train(old)
    skip = {"skip_connection": True}
    for options, message in (
        ({"structure": {**skip, "latents": 41}}, "expected its n_latents 40, found 41; set --latents 40"),
        ({"structure": {**skip, "tie": "source"}}, "expected its tie none, found source; set --tie none"),
        ({"structure": {}}, "has a skip connection: add --skip-connection"),
        ({"structure": skip, "layers": "0,2"}, r"its layers \[1\] are not among those to train"),
        ({"structure": {**skip, "n_targets": 2}}, "its layer 0 writes to layer 2, which --n-targets 2"),
    ):
        config = configure(caches[0], tmp_path / "new", finetune=old.run, **options)
        with pytest.raises(ValueError, match=message):
            train(config)
        assert not config.run.exists()


def test_a_finetuned_run_goes_on_from_the_score_of_the_other(
    caches: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its first FVU is the run's, over the variance of its own cache; it resumes without the other run."""
    old = configure(caches[0], tmp_path / "old", steps=None, epochs=3)
    train(old)
    new = configure(caches[1], tmp_path / "new", finetune=old.run, batch_tokens=1000, steps=1)
    train(new)
    assert f"weights of {old.run}" in capsys.readouterr().err
    logged = json.loads((new.run / "metrics.jsonl").read_text().splitlines()[0])
    expected = evaluate(load_transcoder(old.run), open_source(new, "train")).fvu
    assert [logged[f"fvu/{layer}"] for layer in range(3)] == pytest.approx(expected, rel=1e-4)
    assert expected.mean() < 0.8
    assert load_config(new.run) == new
    shutil.rmtree(old.run)
    assert train(new, resume=True).fvu is None
