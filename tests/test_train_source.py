"""What a source reads from disk, counted in a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from planted import write_planted

from clt.cache_format.layout import SITES

COUNTED = """
import json, os, sys
from collections import Counter
opened, read = Counter(), Counter()

def opens(event, arguments):
    if event == "open" and str(arguments[0]).startswith(sys.argv[1]):
        opened[os.path.relpath(arguments[0], sys.argv[1])] += 1

def preadv(descriptor, buffers, offset, flags=0, preadv=os.preadv):
    size = preadv(descriptor, buffers, offset, flags)
    if not flags:  # otherwise it only looks what is at hand
        read[os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), sys.argv[1])] += size
    return size

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from clt.cache_format import open_cache
from clt.train.reader import Reader, read_in_order
from clt.train.source import Source
sys.addaudithook(opens)
os.preadv = preadv
path, io = Path(sys.argv[1]), sys.argv[2]
if sys.argv[3] == "train":
    source = Source([path], "train", layers=(1,), io=io)
    with Reader(source, buffer_tokens=512, seed=0) as reader:
        reader.next(source.n_tokens // 2)
        reader.next(source.n_tokens - source.n_tokens // 2)
elif sys.argv[3] == "fill":
    source = Source([path], "train", layers=(1,), io=io)
    with ThreadPoolExecutor(3) as pool:
        for chunks in read_in_order(source, 300):
            source.fill(source.allocate(len(chunks)), chunks, pool)
else:
    open_cache(path, io=io)["train"].read("mlp_in", layers=[1])
print(json.dumps([opened, read]))
"""
WINDOWS = 3
INDEX = 8 * 16 + 4
"""Bytes of a shard's index, of windows of 8 chunks."""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, int8, windows of 512 tokens, the last one partial."""
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 1300, val=100)


def counted(cache: Path, io: str, what: str) -> tuple[dict[str, int], dict[str, int]]:
    """(times opened, bytes read by preadv) of the files of the cache."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, str(cache), io, what], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    opened, read = json.loads(done.stdout)
    return opened, read


def shards(sites: tuple[str, ...]) -> set[str]:
    arrays = [f"train/{site}{part}" for site in sites for part in ("", "_scale")]
    return {f"{array}/c.{window}.1.0" for array in arrays for window in range(WINDOWS)}


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_layer_subset_opens_its_own_shards_only(cache: Path, io: str) -> None:
    """An epoch of one layer of three: its shards once each, manifest, journal, three of the token columns."""
    opened, read = counted(cache, io, "train")
    columns = {f"train/token/{name}/c.{w}" for name in ("kind", "sink", "sample") for w in range(WINDOWS)}
    assert {name for name in opened if "/" in name} == shards(SITES) | columns
    assert all(opened[name] == 1 for name in shards(SITES) | columns)
    assert {name for name in opened if "/" not in name} == {"zarr.json", "journal.jsonl"}
    if io == "mmap":
        assert read == dict.fromkeys(shards(SITES), INDEX)


def test_a_pass_over_a_layer_reads_each_of_its_bytes_once(cache: Path) -> None:
    """Counted, indexes included: the sizes of the layer's shards, not a byte more."""
    _, read = counted(cache, "pread", "fill")
    assert read == {name: (cache / name).stat().st_size for name in shards(SITES)}


@pytest.mark.parametrize("io", ["mmap", "pread"])
def test_a_site_reads_its_own_bytes_only(cache: Path, io: str) -> None:
    """One site and layer of the six: no file of another is opened, and no byte is read twice."""
    opened, read = counted(cache, io, "read")
    mine = shards(("mlp_in",))
    assert {name for name in opened if "/" in name} == mine
    if io == "pread":
        assert read == {name: (cache / name).stat().st_size for name in mine}
