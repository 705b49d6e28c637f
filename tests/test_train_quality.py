"""What training finds: planted features, with the directions that they are read from and written to."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from planted import write_orthogonal
from safetensors.torch import load_file

from clt.train.checkpoint import load_transcoder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.loop import train
from clt.train.run_folder import load_config


def best_cosine(planted: torch.Tensor, found: torch.Tensor) -> float:
    """Mean over planted rows of the largest cosine with any row found: (feature, d), (latent, d)."""
    unit = torch.nn.functional.normalize
    return float((unit(planted, dim=1) @ unit(found, dim=1).T).max(dim=1).values.mean())


@pytest.mark.slow
def test_planted_features_are_recovered(tmp_path: Path) -> None:
    """Mean maximum cosine above 0.9 for encoders and, for each (source, target), decoders."""
    world = write_orthogonal(tmp_path / "cache", 20_000)
    layers, features, _ = world.dictionary.shape
    structure = TranscoderConfig(k=4, latents=2 * features, n_targets=layers)
    config = TrainConfig(
        caches=(world.path,),
        run=tmp_path / "run",
        transcoder=structure,
        batch_tokens=500,
        epochs=20,
        lr=1e-2,
    )
    train(config)
    model = load_transcoder(config.run)
    for s in range(layers):
        assert best_cosine(torch.from_numpy(world.dictionary[s]).float(), model.W_enc[s].detach()) > 0.9
        for t in range(s, layers):
            planted = torch.from_numpy(world.decoders[s, t]).float()
            assert best_cosine(planted, model.decoder(s, t).detach()) > 0.9, (s, t)


def test_config_json_alone_makes_the_run_again(tmp_path: Path) -> None:
    """Trained again from its config.json into another folder: the same weights, bit for bit, on a CPU."""
    world = write_orthogonal(tmp_path / "cache", 1000)
    first = TrainConfig(
        caches=(world.path,),
        run=tmp_path / "first",
        transcoder=TranscoderConfig(k=3, latents=20, n_targets=2),
        batch_tokens=70,
        grad_acc_steps=2,
        epochs=2,
        exclude=("bos",),
        seed=3,
    )
    train(first)
    again = replace(load_config(first.run), run=tmp_path / "again")
    train(again)
    stored = sorted(path.relative_to(first.run) for path in first.run.rglob("*.safetensors"))
    assert len(stored) > 3
    for path in stored:
        mine, other = load_file(first.run / path), load_file(again.run / path)
        assert mine.keys() == other.keys()
        assert all(torch.equal(mine[name], other[name]) for name in mine), path
