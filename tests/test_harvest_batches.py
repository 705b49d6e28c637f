"""Packing: little padding, nothing lost, each token as if it were alone; and batches that do not fit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from clt.cache_format import open_cache
from clt.harvest.batches import POOL_BATCHES, cut, pack, padded_tokens, wants_more
from clt.harvest.config import HarvestConfig
from clt.harvest.run import harvest
from clt.harvest.taps import MlpTaps
from clt.harvest.tokens import PreparedSample


def of_length(number: int, length: int) -> PreparedSample:
    return PreparedSample(number, {}, np.ones(length, bool), {}, {})


def instruct_lengths(count: int) -> np.ndarray:
    """As LLaVA-1.5 tokenises its own mixture: 94 % of the rows have a picture of 576 tokens beside a few
    turns of words, lognormal in length; the others are ShareGPT's long chats."""
    rng = np.random.default_rng(0)
    words = np.clip(rng.lognormal(4.9, 0.75, count), 20, None)
    chats = rng.random(count) < 0.06
    words[chats] = rng.lognormal(6.8, 0.7, chats.sum())
    return np.minimum(np.where(chats, words, 576 + words), 1024).astype(int)


def pooled(lengths: np.ndarray, batch_tokens: int) -> list[list[PreparedSample]]:
    """As the harvest does: whenever so many tokens are pooled, they are packed."""
    pool: list[PreparedSample] = []
    batches = []
    for number, length in enumerate(lengths.tolist()):
        pool.append(of_length(number, length))
        if not wants_more(pool, pool[0].number, batch_tokens):
            batches += list(pack(pool, batch_tokens, 0))
            pool = []
    return batches


@pytest.mark.parametrize("batch_tokens", [8192, 16_384])
def test_less_than_five_percent_is_padding(batch_tokens: int) -> None:
    batches = pooled(instruct_lengths(5000), batch_tokens)
    computed = sum(padded_tokens(batch) for batch in batches)
    wanted = sum(sample.length for batch in batches for sample in batch)
    assert len(batches) > 100
    assert 1 - wanted / computed < 0.05
    assert wanted / (len(batches) * batch_tokens) > 0.85  # and the batches are full


def test_the_first_pool_is_one_batch_and_later_ones_grow() -> None:
    pool: list[PreparedSample] = []
    pools = []
    for number in range(400):
        pool.append(of_length(number, 100))
        if not wants_more(pool, pool[0].number, 1000):
            pools.append((pool[0].number, len(pool)))
            pool = []
    most = POOL_BATCHES * 10
    assert pools == [(0, 10), (10, 10), (20, 20), (40, 40), (80, 80), (160, most), (280, most)]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 500), st.integers(0, 3))
def test_packing_loses_nothing_and_keeps_to_the_budget(lengths: list[int], budget: int, seed: int) -> None:
    pool = [of_length(number, length) for number, length in enumerate(lengths)]
    batches = list(pack(pool, budget, seed))
    assert sorted(sample.number for batch in batches for sample in batch) == list(range(len(pool)))
    for batch in batches:
        assert padded_tokens(batch) <= budget or len(batch) == 1
        parts = list(cut(batch, max(1, budget // 2)))
        assert [sample for part in parts for sample in part] == batch
        assert all(padded_tokens(part) <= max(1, budget // 2) or len(part) == 1 for part in parts)
    again = [[sample.number for sample in batch] for batch in pack(pool, budget, seed)]
    assert again == [[sample.number for sample in batch] for batch in batches]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("batches")
    tiny.save_llava(root / "model")
    tiny.write_dataset(root / "data")
    return root


def configure(folder: Path, cache: Path, **options: Any) -> HarvestConfig:
    return HarvestConfig(
        model=str(folder / "model"),
        dataset=str(folder / "data" / "train.jsonl"),
        cache=cache,
        **{"window": 64, "val_fraction": 0.0, "precision": "bf16", **options},
    )


def stored(cache: Path) -> dict[tuple[int, int], np.ndarray]:
    """(sample, position) -> (site, layer, d_model)"""
    split = open_cache(cache)["train"]
    tokens = split.tokens()
    values = np.stack([split.read("mlp_in"), split.read("mlp_out")], axis=1)
    keys = zip(tokens["sample"].tolist(), tokens["position"].tolist(), strict=True)
    return dict(zip(keys, values, strict=True))


def test_a_packed_token_is_that_of_a_batch_of_one_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    """In bfloat16 (8 bits of mantissa) another batch shape may round otherwise at each of three layers: the
    squared difference stays below 1e-4 of the squared norm, and no token strays further than 3 %."""
    harvest(configure(folder, tmp_path / "one", dtype="bfloat16", batch_tokens=1))
    harvest(configure(folder, tmp_path / "many", dtype="bfloat16", batch_tokens=300))
    one, many = stored(tmp_path / "one"), stored(tmp_path / "many")
    assert one.keys() == many.keys()
    alone, packed = (np.stack([found[key] for key in sorted(one)]) for found in (one, many))
    lost = np.linalg.norm(packed - alone, axis=-1) / np.linalg.norm(alone, axis=-1)
    assert (lost**2).mean() < 1e-4
    assert lost.max() < 0.03


def fail_above(tokens: int, fault: Callable[[], Exception]) -> Any:
    """A forward pass that has room for so many tokens, and fails in its middle."""
    run = MlpTaps.run

    def limited(self: MlpTaps, body: Any, inputs: dict[str, Any], receive: Any) -> None:
        def short(site: str, index: int, values: torch.Tensor) -> None:
            receive(site, index, values)
            if index == 1 and inputs["input_ids"].numel() > tokens:
                raise fault()

        run(self, body, inputs, short)

    return limited


FAULTS = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    "CPU": lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_batch_that_does_not_fit_is_halved(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    """One line in the log, a lower budget from then on, and the same tokens."""
    harvest(configure(folder, tmp_path / "whole", batch_tokens=300))
    capsys.readouterr()
    monkeypatch.setattr(MlpTaps, "run", fail_above(170, FAULTS[kind]))
    harvest(configure(folder, tmp_path / "c", batch_tokens=300))
    said = [line for line in capsys.readouterr().err.splitlines() if "do not fit" in line]
    assert len(said) == 1
    assert said[0].startswith("harvest: 2")
    assert said[0].endswith(" a forward pass")
    whole, halved = stored(tmp_path / "whole"), stored(tmp_path / "c")
    assert whole.keys() == halved.keys()
    for key, value in whole.items():
        np.testing.assert_allclose(halved[key], value, rtol=2**-7, atol=1e-5)


def test_it_is_halved_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MlpTaps, "run", fail_above(5, FAULTS["CUDA"]))
    with pytest.raises(
        ValueError, match=r"half a batch, \d+ tokens of \d+ samples, does not fit .*--batch-tokens"
    ):
        harvest(configure(folder, tmp_path / "c", batch_tokens=300))


def test_another_fault_of_the_model_is_not_taken_for_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MlpTaps, "run", fail_above(5, lambda: RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        harvest(configure(folder, tmp_path / "c", batch_tokens=300))
