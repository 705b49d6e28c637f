"""Bytes that were once found to be bad: each is refused, in words, at little cost."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from clt.cache_format import CacheError, CacheWriter, open_cache, verify_cache
from clt.cache_format.reader import read_manifest
from clt.cache_format.shard import Shard

HERE = Path(__file__).parent
CORPUS, GOLDEN = HERE / "corpus", HERE / "golden" / "int8"
MOST = 4 << 20
"""Bytes that refusing may take."""
SLOTS = 4
"""Chunks of each shard of the corpus, (64, 66) int8."""
FILES = sorted(path for path in CORPUS.glob("*/*") if path.parent.name != "__pycache__")


def refusal(parser: str, data: bytes, folder: Path) -> str | None:
    """What a reader says of a stranger's bytes; None where it accepts them. Other exceptions go through."""
    folder.mkdir()
    try:
        if parser == "manifest":
            (folder / "zarr.json").write_bytes(data)
            open_cache(folder)
        elif parser == "journal":
            (folder / "zarr.json").write_bytes((GOLDEN / "zarr.json").read_bytes())
            (folder / "journal.jsonl").write_bytes(data)
            open_cache(folder, check=False)
        else:
            (folder / "c.0.0.0").write_bytes(data)
            read_shard(folder / "c.0.0.0", "mmap")
    except CacheError as fault:
        return str(fault)
    return None


def read_shard(path: Path, io: str) -> None:
    shard, out = Shard(path, SLOTS, io), np.empty((64, 66), np.int8)
    for slot in range(SLOTS):
        shard.decode(slot, out)


def test_the_corpus_is_there() -> None:
    """Every parser has inputs that were picked and inputs that were found."""
    for parser in ("manifest", "journal", "shard"):
        names = [path.name for path in FILES if path.parent.name == parser]
        assert sum(name.startswith("found-") for name in names) >= 3, parser
        assert sum(not name.startswith("found-") for name in names) >= 10, parser


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_bad_bytes_are_refused_in_words_and_cheaply(path: Path, tmp_path: Path) -> None:
    """A CacheError of one line, whoever reads: to open, to go on writing, to verify."""
    parser, data = path.parent.name, path.read_bytes()
    tracemalloc.start()
    try:
        fault = refusal(parser, data, tmp_path / "c")
        assert fault
        assert "\n" not in fault
        assert len(fault) < 1000
        if parser == "shard":
            with pytest.raises(CacheError):
                read_shard(tmp_path / "c" / "c.0.0.0", "pread")
        else:
            with pytest.raises(CacheError):
                CacheWriter(tmp_path / "c", read_manifest(GOLDEN))
            assert verify_cache(tmp_path / "c", full=True) != []
        assert tracemalloc.get_traced_memory()[1] < MOST
    finally:
        tracemalloc.stop()
