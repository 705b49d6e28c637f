"""FORMAT.md is normative: its tables, example and code are held to what the code does."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from planted import write_planted

import clt.cache_format
from clt.cache_format import layout, open_cache
from clt.cache_format.manifest import Manifest, parse_manifest
from clt.cache_format.metadata import documents
from clt.cache_format.permutation import permutation
from clt.cache_format.sealed import SINK_RATIO

TEXT = (Path(clt.cache_format.__file__).parent / "FORMAT.md").read_text()


def section(title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", TEXT, re.M | re.S)
    assert found, title
    return found[1]


def table(title: str) -> dict[str, list[str]]:
    """First column -> the other cells of a section's table."""
    rows = [line.strip("|").split("|") for line in section(title).splitlines() if line.startswith("|")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows[2:]}


def test_the_version_is_this_one() -> None:
    assert TEXT.startswith(f"# The cache format, version {layout.FORMAT_VERSION}\n")


def test_the_table_of_sizes() -> None:
    sizes = {name: int(cells[0]) for name, cells in table("Sizes").items()}
    assert sizes == {"chunk": layout.CHUNK, "group": layout.N_GROUPS}


def test_the_blocks_are_as_written() -> None:
    meaning = table("Manifest")["block"][1]
    assert re.findall(r"\d+", meaning) == [*map(str, layout.BLOCKS), str(layout.BLOCK)]


def test_the_manifest_table_names_exactly_its_fields() -> None:
    assert set(table("Manifest")) == {field.name for field in fields(Manifest)} | {"chunk"}


def test_the_example_manifest_parses_and_round_trips() -> None:
    example = json.loads(re.search(r"```json\n(.*?)```", TEXT, re.S)[1])
    assert parse_manifest(example).to_json() == example


def test_the_token_table_names_columns_dtypes_and_kinds() -> None:
    found = table("Token table")
    assert {name: np.dtype(cells[0]) for name, cells in found.items()} == layout.TOKEN_COLUMNS
    assert found["kind"][1] == ", ".join(f"{n} {kind}" for n, kind in enumerate(layout.KINDS))
    assert f"over {SINK_RATIO:.0f} times the window's median" in found["sink"][1]


def test_the_tree_names_every_array() -> None:
    """Each array that is written appears in the tree, under its group."""
    manifest = parse_manifest(json.loads(re.search(r"```json\n(.*?)```", TEXT, re.S)[1]))
    names = {
        name.split("/")[-2]
        for name in documents(manifest, dict.fromkeys(layout.SPLITS, (0, 0)))
        if "/" in name
    }
    tree = section("Tree")
    for name in names - set(layout.TOKEN_COLUMNS):
        assert re.search(rf"\b{name}\b", tree), name
    for log in (layout.JOURNAL, layout.SAMPLES, layout.REJECTED):
        assert layout.log_name(log, 0) in tree


def test_the_order_is_as_written() -> None:
    """splitmix64 in Python integers, straight from the page."""
    full, step = 2**64 - 1, 0x9E3779B97F4A7C15
    assert f"0x{step:X}" in section("Order")

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & full
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & full
        return z ^ (z >> 31)

    word = 0
    for part in (3, 17):
        word = mix((word + step + part) & full)
    words = [mix((word + i * step) & full) for i in range(1, 101)]
    assert permutation(100, 3, 17).tolist() == sorted(range(100), key=lambda i: words[i])


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_the_six_lines_read_a_cache(tmp_path: Path, precision: str) -> None:
    """The code on the page, run as it stands, gives what our reader gives."""
    path = write_planted(tmp_path / "c", 700, precision=precision)
    code = re.search(r"```python\n(.*?)```", section("Numbers"), re.S)[1]
    assert len(code.strip().splitlines()) == 6
    scope: dict[str, Any] = {"zarr": zarr, "np": np, "path": str(path), "start": 100, "stop": 650}
    exec(code, scope)
    assert np.array_equal(scope["values"], open_cache(path)["train"].read("mlp_in", start=100, stop=650))


@pytest.mark.parametrize("channels", layout.BLOCKS)
def test_the_int8_step_is_as_written(channels: int) -> None:
    """max(min(sqrt(pi/2) mean|x| / q, 65504), absmax of the block / 127), rounded up to float16."""
    from clt.cache_format.int8 import quantise

    x = np.random.default_rng(0).standard_normal((20, 150)).astype(np.float32)
    x[3, 70] = 4000.0
    scale = quantise(x, 8.0, channels).scale.astype(np.float64)
    for block in range(-(-150 // channels)):
        mean = np.sqrt(np.pi / 2) * np.abs(x).mean(axis=1) / 8
        step = np.maximum(mean, np.abs(x[:, channels * block : channels * (block + 1)]).max(axis=1) / 127)
        assert (scale[:, block] >= step * (1 - 1e-6)).all()
        assert (scale[:, block] <= step * (1 + 2**-10)).all()


def test_keys_of_files(tmp_path: Path) -> None:
    cache = open_cache(write_planted(tmp_path / "c", 700))
    entry = cache["train"].entries[1]
    assert {
        "train/mlp_in/c.1.2.0",
        "train/token/kind/c.1",
        "stats/train/mlp_in/sum/c.1.0.0.0",
    } <= entry.files.keys()


def test_the_journal_is_as_written(tmp_path: Path) -> None:
    from google_crc32c import value as crc32c

    path = write_planted(tmp_path / "c", 700)
    lines = (path / "journal.jsonl").read_bytes().splitlines()
    head, *windows, last = [json.loads(line) for line in lines]
    assert head["format"] == "clt"
    manifest = json.loads((path / "zarr.json").read_text())["attributes"]["clt"]
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    assert head["manifest_crc32c"] == f"{crc32c(canonical):08x}"
    assert last["complete"] is True
    for entry in windows:
        assert {"split", "window", "tokens", "cursor", "skip", "samples", "rejected", "files"} < entry.keys()
        for name, (size, check) in entry["files"].items():
            data = (path / name).read_bytes()
            assert (len(data), f"{crc32c(data):08x}") == (size, check)
    for line in lines:
        body, check = line.split(b',"crc32c":"')[0], json.loads(line)["crc32c"]
        assert f"{crc32c(body):08x}" == check
