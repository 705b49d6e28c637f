"""Tokens that do not count: nothing of a run, nor of its score, depends on them."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import write_planted
from test_train_loop import configure, weights

from clt.cache_format import CacheWriter, open_cache
from clt.train.checkpoint import load_transcoder
from clt.train.evaluate import evaluate
from clt.train.loop import open_source, train
from clt.train.reader import Reader
from clt.train.run_folder import load_config
from clt.train.selection import Selection
from clt.train.source import Source

KIND = np.array([0, 1, 1, 0, 2, 3, 1], np.uint8)
SINK = np.array([0, 0, 1, 0, 1, 0, 0], bool)
IDS = np.array([5, 9, 9, 7, 1, 5, 8], np.int32)


def test_each_rule_and_all_together() -> None:
    def chosen(**rules: object) -> list[int]:
        return np.flatnonzero(Selection(**rules).chosen(KIND, SINK, IDS)).tolist()

    assert chosen() == [0, 1, 2, 3, 4, 5, 6]
    assert chosen(kinds=("image", "bos")) == [1, 2, 4, 6]
    assert chosen(exclude=("bos", "template")) == [0, 1, 2, 3, 6]
    assert chosen(exclude=("sink",)) == [0, 1, 3, 5, 6]
    assert chosen(exclude_token_ids=(5, 8)) == [1, 2, 3, 4]
    assert chosen(exclude=("bos", "sink"), exclude_token_ids=(9,), kinds=("text", "image", "bos")) == [
        0,
        3,
        6,
    ]


def test_a_share_of_a_kind() -> None:
    """About the share, of that kind alone, the same ones each time, others with another seed."""
    kind = np.random.default_rng(0).integers(0, 4, 40_000).astype(np.uint8)
    sink = np.zeros(len(kind), bool)
    first, again, other = (
        Selection(keep_kind=(("image", 0.25),), seed=seed).chosen(kind, sink, None) for seed in (3, 3, 4)
    )
    assert (first == again).all()
    assert (first != other).any()
    assert first[kind != 1].all()
    assert abs(first[kind == 1].mean() - 0.25) < 0.02
    assert Selection(keep_kind=(("image", 1.0),)).chosen(kind, sink, None).all()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("selection") / "c", 2000, val=400)


@pytest.fixture(scope="module")
def twisted(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two caches that are the same but for the values of tokens of id 3 and kind template."""
    paths, original = [], open_cache(cache)
    for name, scale in (("plain", 1.0), ("wild", 7.0)):
        path = tmp_path_factory.mktemp("twisted") / name
        noise = np.random.default_rng(2)
        with CacheWriter(path, original.manifest, threads=1) as writer:
            for number, split in enumerate(("train", "val")):
                held = original[split]
                n = len(held)
                odd = np.random.default_rng(5).random(n) < 0.2
                values = {site: held.read(site) for site in ("mlp_in", "mlp_out")}
                for site in values:
                    values[site][odd] = scale * noise.standard_normal(values[site][odd].shape)
                columns = {k: v.copy() for k, v in held.tokens().items() if k != "sink"}
                columns["token_id"] = np.where(odd, 3, 0)
                columns["kind"] = np.where(odd, 3, columns["kind"]).astype(np.uint8)
                columns["sample"], columns["position"] = np.full(n, number), np.arange(n)
                writer.add(split, 0, {"sample": number, "id": split}, columns, values)
            writer.finish()
        paths.append(path)
    return paths[0], paths[1]


@pytest.mark.parametrize(
    "rule", [{"exclude_token_ids": (3,)}, {"exclude": ("template",)}], ids=["id", "kind"]
)
def test_what_does_not_count_changes_no_weight_and_no_score(
    twisted: tuple[Path, Path], tmp_path: Path, rule: dict[str, object]
) -> None:
    """Weights, held-out FVU, L0 and dead shares are bit for bit those with other such tokens."""
    found = []
    for path in twisted:
        config = configure(path, tmp_path / path.name, steps=6, **rule)
        train(config)
        score = evaluate(load_transcoder(config.run), open_source(config, "val"))
        found.append((weights(config.run / "step-00000006"), score))
    (first, before), (second, after) = found
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    np.testing.assert_array_equal(before.fvu, after.fvu)
    np.testing.assert_array_equal(before.l0, after.l0)
    np.testing.assert_array_equal(before.dead, after.dead)


def test_statistics_weigh_kinds_by_what_is_left_of_them(cache: Path) -> None:
    source = Source([cache], "train", selection=Selection(keep_kind=(("image", 0.25),)))
    values = open_cache(cache)["train"].read("mlp_out").astype(np.float64)
    left = np.where(source.kind == 1, source.chosen[source.kind == 1].mean(), 1.0)
    mean = np.average(values, axis=0, weights=left)
    variance = np.average(((values - mean) ** 2).sum(axis=-1), axis=0, weights=left)
    found = source.statistics("mlp_out")
    np.testing.assert_allclose(found.mean, mean, atol=1e-6)
    np.testing.assert_allclose(found.variance, variance, rtol=1e-5)
    assert found.tokens == source.n_tokens


@pytest.mark.parametrize("world", [1, 2])
def test_a_share_is_the_same_for_all_threads_and_ranks_and_every_epoch(cache: Path, world: int) -> None:
    selection = Selection(keep_kind=(("image", 0.3),), seed=5)
    expected = np.flatnonzero(Source([cache], "train", selection=selection).chosen).tolist()
    for threads in (1, 3):
        tokens = []
        for rank in range(world):
            source = Source([cache], "train", selection=selection)
            reading = Reader(source, buffer_tokens=640, seed=1, threads=threads, rank=rank, world_size=world)
            with reading as reader:
                for _ in range(2):
                    tokens += reader.next(len(expected)).token.tolist()
        assert sorted(tokens) == sorted([*expected, *expected])


def test_a_run_with_a_share_resumes_exactly(cache: Path, tmp_path: Path) -> None:
    options = {"keep_kind": (("image", 0.5),), "save_every": 3, "lr_schedule": "constant"}
    train(configure(cache, tmp_path / "whole", steps=6, **options))
    train(configure(cache, tmp_path / "part", steps=3, **options))
    part = configure(cache, tmp_path / "part", steps=6, **options)
    path = part.run / "config.json"
    path.write_text(path.read_text().replace('"steps": 3', '"steps": 6'))
    assert load_config(part.run) == part
    train(part, resume=True)
    first, second = (weights(tmp_path / name / "step-00000006") for name in ("whole", "part"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--exclude-token-ids a,b", "expected numbers, as in 0,2"),
        ("--keep-kind image", "as in image=0.25"),
        ("--keep-kind sound=0.5", "expected one of text, image"),
        ("--keep-kind image=0", "expected a share above 0"),
        ("--exclude-token-ids 0", "no token of split train"),
    ],
)
def test_wrong_options(cache: Path, tmp_path: Path, option: str, words: str) -> None:
    command = [
        sys.executable,
        "-m",
        "clt.cli",
        "train",
        str(cache),
        "--run-name",
        "r",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run([*command, *option.split()], capture_output=True, text=True)
    assert done.returncode == 2
    assert words in done.stderr
