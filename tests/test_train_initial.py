"""How a transcoder begins: from the cache's statistics alone, which its checkpoints keep."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import LAYERS, WIDTH, write_planted
from safetensors.torch import load_file

from clt.cache_format import open_cache
from clt.train.checkpoint import load_transcoder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.loop import open_source, train
from clt.train.transcoder import new_transcoder

STRUCTURE = TranscoderConfig(k=4, latents=40, n_targets=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 1000, val=100, precision="bf16")


def configure(cache: Path, run: Path) -> TrainConfig:
    return TrainConfig(caches=(cache,), run=run, transcoder=STRUCTURE, batch_tokens=100, threads=1, steps=2)


def test_a_fresh_transcoder_predicts_the_mean_and_reads_centred_inputs(cache: Path, tmp_path: Path) -> None:
    """In model units: b_dec is the mean output, b_enc is -W_enc mean, and no latent sees its layer's size."""
    source = open_source(configure(cache, tmp_path), "train")
    model = new_transcoder(STRUCTURE, source, torch.float64, seed=0)
    split = open_cache(cache)["train"]
    x, y = (split.read(site).astype(np.float64) for site in ("mlp_in", "mlp_out"))
    for layer in range(LAYERS):
        mean = torch.from_numpy(x[:, layer].mean(axis=0))
        spread = np.sqrt(((x[:, layer] - x[:, layer].mean(axis=0)) ** 2).mean())
        folded = model.W_enc[layer] / float(model.inputs.scale[layer])
        torch.testing.assert_close(model.inputs.scale[layer].item(), spread, rtol=1e-5, atol=0)
        values = torch.from_numpy(x[:50, layer])
        expected = values @ folded.T - folded @ mean  # b_enc = -W_enc mean(x)
        found = model.pre_activations(model.inputs.apply_to(values.clone(), layer), layer)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    predicted = model(torch.from_numpy(x[:7]))
    means = torch.from_numpy(y.mean(axis=0)).expand(7, LAYERS, WIDTH)
    torch.testing.assert_close(predicted, means, rtol=1e-5, atol=1e-5)


def test_statistics_are_written_once_and_stay(cache: Path, tmp_path: Path) -> None:
    """Checkpoints hold those of the cache; what finetunes from one on another cache keeps them."""
    first = configure(cache, tmp_path / "first")
    train(first)
    other = write_planted(tmp_path / "other", 600, seed=5, precision="bf16")
    second = replace(configure(other, tmp_path / "second"), finetune=first.run)
    train(second)
    names = ("in_mean", "in_scale", "out_mean", "out_scale")
    for layer in range(LAYERS):
        file = Path(f"layers.{layer}") / "transcoder.safetensors"
        kept, mine = (
            load_file(first.run / "step-00000002" / file),
            load_file(second.run / "step-00000002" / file),
        )
        statistics = open_source(first, "train").statistics("mlp_in")
        assert torch.equal(kept["in_mean"], torch.from_numpy(statistics.mean[layer]).float())
        assert all(torch.equal(kept[name], mine[name]) for name in names)
    assert torch.equal(load_transcoder(second.run).inputs.mean, load_transcoder(first.run).inputs.mean)


@pytest.mark.parametrize("tie", ["none", "source", "target"])
@pytest.mark.parametrize("optimizer", ["adam", "signum", "muon"])
def test_every_pair_of_layers_is_trained(cache: Path, tmp_path: Path, tie: str, optimizer: str) -> None:
    """Decoders begin at zero and encoders do not: that is no saddle, and no decoder and no encoder stays."""
    structure = replace(STRUCTURE, tie=tie, n_targets=LAYERS, skip_connection=True)
    config = replace(configure(cache, tmp_path / "run"), transcoder=structure, optimizer=optimizer, steps=3)
    fresh = new_transcoder(structure, open_source(config, "train"), torch.float32, config.seed)
    train(config)
    model = load_transcoder(config.run)
    for layer in range(LAYERS):
        for before, after in ((fresh.W_enc, model.W_enc), (fresh.b_enc, model.b_enc)):
            assert not torch.equal(before[layer], after[layer])
        for target in range(layer, LAYERS):
            assert not fresh.decoder(layer, target).any()
            assert bool(model.decoder(layer, target).any(dim=1).float().mean() > 0.5)
