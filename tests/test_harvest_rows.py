"""Datasets in every form, and the order in which they are read."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from clt.harvest.json_rows import MAX_ROW, open_json_lines
from clt.harvest.pictures import PictureSource, load_picture
from clt.harvest.rows import BadSample, Table, open_rows
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
    one = open_json_lines(tiny.write_rows(tmp_path, ROWS, "a.jsonl"))
    same = open_json_lines(tiny.write_rows(tmp_path, ROWS, "b.jsonl"))
    other = open_json_lines(tiny.write_rows(tmp_path, ROWS[:4], "c.jsonl"))
    assert one.fingerprint == same.fingerprint != other.fingerprint


@pytest.mark.parametrize("form", ["parquet", "folder", "folder of parquet"])
def test_a_copy_has_the_same_fingerprint_and_another_content_has_not(
    tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A harvest goes on, and `clt info --token` finds its text, where a dataset was copied to."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")

    def save(rows: list[dict[str, str]], folder: Path) -> str:
        table = datasets.Dataset.from_list(rows)
        if form == "folder":
            table.save_to_disk(folder)
            return str(folder)
        folder.mkdir()
        table.to_parquet(folder / "d.parquet")
        return str(folder / "d.parquet" if form == "parquet" else folder)

    one = save(ROWS, tmp_path / "one")
    other = save([*ROWS[:4], {"id": "t4", "text": "text number 5"}], tmp_path / "other")
    shutil.copytree(tmp_path / "one", tmp_path / "copy")
    for path in (tmp_path / "copy").rglob("*"):
        os.utime(path, (1e9, 1e9))
    copy = one.replace(str(tmp_path / "one"), str(tmp_path / "copy"))
    first, same, different = (open_rows(place, "train") for place in (one, copy, other))
    assert first.fingerprint == same.fingerprint != different.fingerprint
    assert dict(same[4]) == ROWS[4]


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(ValueError, match=r"empty.jsonl is empty; expected one JSON object a line"):
        open_rows(str(tmp_path / "empty.jsonl"), "train")


WORDS = st.text(st.sampled_from('ab"\\[]{},: \n\ud800é\U0001f600'), max_size=6)
JSON = st.recursive(
    st.none() | st.integers() | WORDS,
    lambda one: st.lists(one, max_size=3) | st.dictionaries(WORDS, one, max_size=3),
    max_leaves=5,
)
OBJECTS = st.lists(st.dictionaries(WORDS, JSON, max_size=3), min_size=1, max_size=4)


@given(OBJECTS, st.sampled_from([None, 1, "\t"]), st.booleans())
def test_elements_of_a_list_are_found_whatever_they_hold(
    rows: list[dict[str, Any]], indent: Any, ascii_only: bool
) -> None:
    """Brackets, commas, quotes and backslashes inside strings, nested lists, any spacing, any letters."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.json"
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
        path.write_bytes(text.encode(errors="surrogatepass"))
        found = open_rows(str(path), "train")
        assert len(found) == len(rows)
        for number, row in enumerate(rows):
            try:
                assert found[number] == row
            except BadSample:
                assert not ascii_only  # half a surrogate pair is no UTF-8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}, {"b": 2}', "the list has no end"),
        (b'[{"a": 1}, {"b": "2}]', "the string at byte 17 has no end"),
        (b'[{"a": 1}] [1]', "more follows behind the list, at byte 10"),
        (b"[{]", "the list has no end"),
        (b"  [ ]  ", "found an empty one"),
        (b" \n ", "found blanks alone"),
        (b"null", "found b'null'"),
        ("[{}]".encode("utf-16"), "found b'"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        open_rows(str(tmp_path / "a.json"), "train")


def test_one_bad_element_is_one_bad_row(tmp_path: Path) -> None:
    """Whatever stands between two commas; the others are read."""
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf[{"a": 1}, {"a" 2}, {"a": "\xff"}, , 3, {"a": 4},]')
    rows = open_rows(str(tmp_path / "a.json"), "train")
    assert [rows[0], rows[5]] == [{"a": 1}, {"a": 4}]
    for number, reason in (
        (1, "not JSON"),
        (2, "not JSON"),
        (3, "not JSON"),
        (4, "found int"),
        (6, "not JSON"),
    ):
        with pytest.raises(BadSample, match=reason):
            rows[number]
    assert len(rows) == 7


def test_a_line_of_a_hundred_megabytes_is_one_bad_row(tmp_path: Path) -> None:
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"text": "one"}\n{"text": "')
        file.write(b"x" * 100_000_000)
        file.write(b'"}\n\n  \n{"text": "two"}')
    rows = open_rows(str(tmp_path / "a.jsonl"), "train")
    assert [rows[0], rows[2]] == [{"text": "one"}, {"text": "two"}]
    with pytest.raises(BadSample, match=f"a row of 100000013 bytes; at most {MAX_ROW} are read"):
        rows[1]
    assert len(rows) == 3


def test_a_row_as_deep_as_a_well_is_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": ' + "[" * 100_000 + "]" * 100_000 + '}\n{"text": "one"}')
    rows = open_rows(str(tmp_path / "a.jsonl"), "train")
    with pytest.raises(BadSample, match="not JSON"):
        rows[0]
    assert rows[1] == {"text": "one"}


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
