"""Datasets in every form, and the order in which they are read."""

import hashlib
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
from PIL import Image

from clt.harvest.pictures import PictureSource, load_picture
from clt.harvest.rows import BadSample, JsonLines, Table, open_rows
from clt.harvest.samples import is_val, parse_sample, split_tags

ROWS = [{"id": f"t{i}", "text": f"text number {i}"} for i in range(5)]


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "folder", "dict"])
def test_every_form_gives_the_same_rows(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    table = datasets.Dataset.from_list(ROWS)
    path = tmp_path / f"data.{form}"
    match form:
        case "jsonl":
            tiny.write_rows(tmp_path, ROWS, path.name)
        case "json":
            table.to_json(path, lines=False)
        case "parquet":
            table.to_parquet(path)
        case "folder":
            table.save_to_disk(path)
        case "dict":
            datasets.DatasetDict({"train": table}).save_to_disk(path)
    rows = open_rows(str(path), "train")
    assert len(rows) == 5
    assert [dict(rows[i]) for i in range(5)] == ROWS
    assert rows.fingerprint


def test_pictures_inside_a_parquet_file_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`image` as {bytes, path}."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    tiny.write_picture(tmp_path / "a.png", np.random.default_rng(0))
    data = (tmp_path / "a.png").read_bytes()
    row = tiny.picture_row(0, {"bytes": data, "path": "a.png"})
    datasets.Dataset.from_list([row]).to_parquet(tmp_path / "d.parquet")
    sample = parse_sample(open_rows(str(tmp_path / "d.parquet"), "train")[0], 0, None)
    picture = load_picture(sample.references[0], PictureSource(None))
    assert picture.reference == "a.png"
    assert picture.sha256 == hashlib.sha256(data).hexdigest()
    assert np.array_equal(np.asarray(picture.image), np.asarray(Image.open(tmp_path / "a.png")))


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "d")
    with pytest.raises(ValueError, match="with split 'train'"):
        open_rows(str(tmp_path / "d"), "train")


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    one = JsonLines(tiny.write_rows(tmp_path, ROWS, "a.jsonl"))
    same = JsonLines(tiny.write_rows(tmp_path, ROWS, "b.jsonl"))
    other = JsonLines(tiny.write_rows(tmp_path, ROWS[:4], "c.jsonl"))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl is empty; expected one JSON object a line"):
        open_rows(str(tmp_path / "empty.jsonl"), "train")


@pytest.mark.parametrize("world", [1, 2, 3])
def test_ranks_share_the_samples(world: int) -> None:
    """Every row belongs to exactly one rank, in an order that the seed decides."""
    rows = Table([{"text": str(i)} for i in range(100)], "", None)
    parts = [[(one.number, one.row) for one in rows.walk(7, rank, world)] for rank in range(world)]
    assert sorted(row for part in parts for _, row in part) == list(range(100))
    assert sorted(pair for part in parts for pair in part) == [
        (one.number, one.row) for one in rows.walk(7, 0, 1)
    ]
    assert [one.row for one in rows.walk(7, 0, 1)] != [one.row for one in rows.walk(8, 0, 1)]
    assert all(one.read() == {"text": str(one.row)} for one in rows.walk(7, 0, 1))


def test_val_is_a_share_of_the_ids() -> None:
    """About the fraction asked for, always the same ids, another choice with another seed."""
    chosen = {i for i in range(5000) if is_val(f"id-{i}", 0, 0.1)}
    assert 400 < len(chosen) < 600
    assert chosen == {i for i in range(5000) if is_val(f"id-{i}", 0, 0.1)}
    assert chosen != {i for i in range(5000) if is_val(f"id-{i}", 1, 0.1)}
    assert not any(is_val(str(i), 0, 0.0) for i in range(100))


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("<image>\nWhat?", [None, "What?"]),
        ("What?\n<image>", ["What?", None]),
        ("a <image> b <image> c", ["a ", None, " b ", None, " c"]),
        ("plain\n", ["plain\n"]),
    ],
)
def test_tags_cut_the_text(value: str, parts: list[Any]) -> None:
    """The newline beside a tag belongs to the tag; other text stays as it is."""
    assert split_tags(value) == parts
    row = {"conversations": [{"from": "human", "value": value}]}
    if None in parts:
        with pytest.raises(BadSample, match=f"{parts.count(None)} times <image>"):
            parse_sample(row, 0, None)
    else:
        assert parse_sample(row, 0, None).turns[0].parts == parts
