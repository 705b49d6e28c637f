"""`clt info --token` for other forms of source: plain text, and several pictures inside parquet."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny

from clt.cache_format import open_cache
from clt.cache_format.provenance import trace_token
from clt.harvest.config import HarvestConfig
from clt.harvest.provenance import read_source, render_token
from clt.harvest.run import harvest


def harvested(model: Path, dataset: Path, **options: Any) -> Path:
    cache = dataset.parent / "c"
    settings: dict[str, Any] = {"window": 64, "val_fraction": 0.0, **options}
    harvest(HarvestConfig(model=str(model), dataset=str(dataset), cache=cache, **settings))
    return cache


def places(cache: Path, kind: int) -> list[int]:
    """A few tokens of a kind, spread over the split."""
    found = np.flatnonzero(open_cache(cache)["train"].token_column("kind") == kind)
    return found[:: max(1, len(found) // 6)].tolist()


def test_plain_text(tmp_path: Path) -> None:
    """Each token's string stands in its row's text; what was cut off is told."""
    texts = ["a red circle", "what is in the picture " * 30]
    path = tiny.write_rows(tmp_path / "data", [{"id": f"t{n}", "text": text} for n, text in enumerate(texts)])
    cache = harvested(tiny.save_llama(tmp_path / "llama"), path, ctx_len=40)
    opened = open_cache(cache)
    for number in places(cache, 0) + places(cache, 2):
        trace = trace_token(opened, "train", number)
        found = read_source(trace, opened.manifest.source)
        assert found.notes == []
        text = texts[int(trace["id"][1:])]
        assert found.text == text
        assert trace["kind"] == "bos" or found.token_string in text
        assert (trace["cut"] > 0) == (trace["id"] == "t1")
        said = render_token(trace, found)
        assert ("more were cut off)" in said) == (trace["id"] == "t1")
        assert "image " not in said


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[bytes]]]:
    """A cache of a parquet file of six samples with two or three pictures each, and the pictures' bytes."""
    root = tmp_path_factory.mktemp("forms")
    rng, rows, held = np.random.default_rng(0), [], []
    for number in range(6):
        files = []
        for place in range(2 + number % 2):
            tiny.write_picture(root / f"{number}-{place}.png", rng)
            files.append((root / f"{number}-{place}.png").read_bytes())
        talk = [
            {"role": "user", "content": "what is it"},
            {"role": "assistant", "content": f"a circle {number}"},
        ]
        rows.append(
            {"id": number, "images": [{"bytes": one, "path": None} for one in files], "messages": talk}
        )
        held.append(files)
    table = datasets.Dataset.from_list(rows)
    (root / "data").mkdir()
    table.cast_column("images", datasets.List(datasets.Image())).to_parquet(root / "data" / "d.parquet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "hf")
        cache = harvested(tiny.save_llava(root / "model"), root / "data" / "d.parquet", ctx_len=200)
    return cache, held


def test_several_pictures_inside_a_parquet_file(
    pictures: tuple[Path, list[list[bytes]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash is that of the very picture whose patch the token is, by its place among the image tokens."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    cache, held = pictures
    opened = open_cache(cache)
    columns = opened["train"].tokens()
    for number in places(cache, 1):
        trace = trace_token(opened, "train", number)
        mine = (columns["sample"] == trace["sample"]) & (columns["kind"] == 1)
        nth = int((columns["position"][mine] < trace["position"]).sum())
        data = held[int(trace["id"])][nth // tiny.IMAGE_TOKENS]
        assert trace["image"]["sha256"] == hashlib.sha256(data).hexdigest()
        assert (trace["image"]["row"], trace["image"]["col"]) == divmod(nth % tiny.IMAGE_TOKENS, 3)
        found = read_source(trace, opened.manifest.source)
        assert found.notes == []
        assert found.image_unchanged is True
        assert found.image_path is None
        assert f"a circle {trace['id']}" in found.text
        assert "in the row itself: unchanged" in render_token(trace, found)


@pytest.mark.slow
def test_the_command_reads_parquet(pictures: tuple[Path, list[list[bytes]]]) -> None:
    cache, _ = pictures
    command = [
        sys.executable,
        "-m",
        "clt.cli",
        "info",
        str(cache),
        "--token",
        str(places(cache, 1)[1]),
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["source"]["image_unchanged"] is True
    assert answer["source"]["token_string"] == "<image>"
    assert answer["source"]["text"].startswith("user: <image> <image>")
