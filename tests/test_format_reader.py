"""The reader: any range, any layers, the true numbers or an error that names the file."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from clt.cache_format import CacheError, DamagedCacheError, open_cache, open_shards
from clt.cache_format.codec import encode_chunk
from clt.cache_format.layout import BLOCK, CHUNK, SITES
from clt.cache_format.open_shards import InWindow

ONE_CACHE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
IO = pytest.mark.parametrize("io", ["mmap", "pread"])


@pytest.fixture
def tiny(make_cache: Callable[..., Any]) -> Any:
    return make_cache()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's list of open files")
@IO
def test_kept_shards_take_the_files_that_are_theirs(
    tiny: Any, io: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a map are counted too; whoever looks at more shards leaves no more open."""
    monkeypatch.setattr(open_shards, "files_at_a_time", lambda: 4)
    monkeypatch.setattr(open_shards, "_KEPT", WeakSet())
    split = open_cache(tiny.path, io=io)["train"]
    before = len(os.listdir("/proc/self/fd"))
    for site, layer in product(SITES, range(3)):
        split.fetch(site, layer, [InWindow(split.entries[0].window, [0], [0])])
    assert 0 < len(os.listdir("/proc/self/fd")) - before <= 4


@ONE_CACHE
@given(data=st.data())
def test_any_range_and_layers_are_cut_from_the_whole(tiny: Any, data: st.DataObject) -> None:
    """read(start, stop, layers) is the whole, sliced as Python slices."""
    split = open_cache(tiny.path, io=data.draw(st.sampled_from(["mmap", "pread"])))["train"]
    site = data.draw(st.sampled_from(SITES))
    start = data.draw(st.integers(-400, 400))
    stop = data.draw(st.none() | st.integers(-400, 400))
    layers = data.draw(st.none() | st.lists(st.sampled_from([0, 2, 5]), max_size=4))
    places = [0, 1, 2] if layers is None else [(0, 2, 5).index(layer) for layer in layers]
    expected = tiny.expected(split, site)[start:stop][:, places]
    np.testing.assert_array_equal(split.read(site, layers=layers, start=start, stop=stop), expected)


def test_chunk_places_partition_the_tokens(tiny: Any) -> None:
    """Chunks are numbered in token order, and every token is in exactly one, partial ones included."""
    for name in ("train", "val"):
        split = open_cache(tiny.path)[name]
        places = split.chunk_places(np.arange(split.n_chunks))
        tokens = [range(s, s + n) for s, n in zip(places.start.tolist(), places.tokens.tolist(), strict=True)]
        assert [token for chunk in tokens for token in chunk] == list(range(len(split)))
        assert (places.tokens >= 1).all()
        assert (places.tokens <= CHUNK).all()


@IO
def test_chunks_decode_to_what_read_gives(tiny: Any, io: str) -> None:
    """Stored numbers go to the places that were named, padded rows being zero."""
    split = open_cache(tiny.path, io=io)["val"]
    whole = split.read("mlp_out", layers=[2])[:, 0]
    chunks = np.random.default_rng(0).permutation(split.n_chunks)
    places = split.chunk_places(chunks)
    codes = np.empty((len(chunks) * CHUNK, 80), np.int8)
    scale = np.empty((len(chunks) * CHUNK, 3), np.float16)
    split.fetch("mlp_out", 1, split.by_window(chunks, np.arange(len(chunks)))).decode(codes, scale)
    values = codes * np.repeat(scale.astype(np.float32), BLOCK, axis=1)[:, :80]
    for at, (tokens, start) in enumerate(zip(places.tokens.tolist(), places.start.tolist(), strict=True)):
        first = at * CHUNK
        np.testing.assert_array_equal(values[first : first + tokens], whole[start : start + tokens])
        assert not codes[first + tokens : first + CHUNK].any()


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda cache: cache["test"], "expected one of the splits"),
        (lambda cache: cache["train"].read("resid"), "expected one of the sites"),
        (lambda cache: cache["train"].read("mlp_in", layers=[1]), "layer 1 is not in this cache"),
        (lambda cache: open_cache(cache.path, io="aio"), "io: expected one of"),
    ],
)
def test_what_the_cache_does_not_hold_is_refused(
    tiny: Any, use: Callable[[Any], object], message: str
) -> None:
    """Another split, site or layer: an error that lists what there is."""
    with pytest.raises(CacheError, match=message):
        use(open_cache(tiny.path))


def test_an_empty_split_reads_as_nothing(make_cache: Callable[..., Any]) -> None:
    """A split without tokens has length 0 and arrays of length 0."""
    split = open_cache(make_cache(lengths=(9,)).path)["val"]
    assert len(split) == split.n_chunks == split.bytes == 0
    assert split.read("mlp_in").shape == (0, 3, 80)
    assert split.tokens()["sample"].shape == (0,)
    assert split.statistics("mlp_in").tokens == 0


def test_what_is_no_cache_is_refused(tmp_path: Path) -> None:
    """A missing folder, an empty one, a file, a foreign zarr store."""
    (tmp_path / "file").write_text("x")
    for name in ("missing", ".", "file"):
        with pytest.raises(CacheError, match=r"is no cache: expected a file zarr\.json"):
            open_cache(tmp_path / name)
    (tmp_path / "zarr.json").write_text('{"zarr_format":3,"node_type":"group","attributes":{}}')
    with pytest.raises(CacheError, match="does not describe a cache"):
        open_cache(tmp_path)


def test_all_missing_and_cut_files_are_listed_at_once(tiny: Any) -> None:
    """One error names every fault: absent, truncated, grown, or a folder in the file's place."""
    (tiny.path / "train/mlp_in/c.0.1.0").unlink()
    os.truncate(tiny.path / "val/token/kind/c.1", 3)
    with open(tiny.path / "train/mlp_out/c.2.2.0", "ab") as file:
        file.write(b"x")
    (tiny.path / "stats/val/count/c.0.0").unlink()
    (tiny.path / "stats/val/count/c.0.0").mkdir()
    with pytest.raises(DamagedCacheError) as caught:
        open_cache(tiny.path)
    message = str(caught.value)
    assert "4 faulty files" in message
    assert "train/mlp_in/c.0.1.0 is missing" in message
    assert "val/token/kind/c.1 has 3 bytes, expected" in message
    assert "train/mlp_out/c.2.2.0 has " in message
    assert "stats/val/count/c.0.0 is no file" in message
    assert "\n" not in message


def test_many_faults_are_counted_and_the_first_ones_named(tiny: Any) -> None:
    """Where a whole folder is gone the message stays readable."""
    shutil.rmtree(tiny.path / "train")
    with pytest.raises(DamagedCacheError, match=r"57 faulty files: .* and 37 more"):
        open_cache(tiny.path)


@IO
@pytest.mark.parametrize("array", ["mlp_in", "mlp_in_scale"])
def test_a_damaged_chunk_names_its_file_and_spares_the_others(tiny: Any, io: str, array: str) -> None:
    """Reading a flipped bit raises, with split, site, window and layer in the path; the rest reads."""
    path = tiny.path / f"train/{array}/c.1.2.0"
    data = bytearray(path.read_bytes())
    data[20] ^= 4
    path.write_bytes(bytes(data))
    split = open_cache(tiny.path, io=io)["train"]
    with pytest.raises(DamagedCacheError, match=rf"train/{array}/c\.1\.2\.0, chunk 0: .*copy the file again"):
        split.read("mlp_in")
    whole = tiny.expected(split, "mlp_in")
    np.testing.assert_array_equal(split.read("mlp_in", layers=[0, 2]), whole[:, :2])
    np.testing.assert_array_equal(split.read("mlp_in", start=192), whole[192:])


@pytest.mark.parametrize("name", ["train/token/sample/c.0", "stats/train/mlp_in/sum/c.2.0.0.0"])
def test_a_damaged_small_array_names_its_file(tiny: Any, name: str) -> None:
    """The token table and the statistics are checked like the shards."""
    data = bytearray((tiny.path / name).read_bytes())
    data[-3] ^= 1
    (tiny.path / name).write_bytes(bytes(data))
    split = open_cache(tiny.path)["train"]
    with pytest.raises(DamagedCacheError, match=name):
        split.tokens() if "token" in name else split.statistics("mlp_in")


def test_a_layer_subset_needs_only_its_own_files(tiny: Any) -> None:
    """With all other layers' files unreadable, a layer still reads; the others' bytes are never touched."""
    split = open_cache(tiny.path)["train"]
    expected = tiny.expected(split, "mlp_in")[:, 1:2]
    for path in tiny.path.glob("train/mlp_*/c.*"):
        if path.name.split(".")[2] != "1":
            path.write_bytes(b"\0" * path.stat().st_size)
    np.testing.assert_array_equal(split.read("mlp_in", layers=[2]), expected)


def test_the_fingerprint_follows_the_content(make_cache: Callable[..., Any]) -> None:
    """Equal for equal content wherever it lies; another for another seed, length or precision."""
    same = [make_cache(name).path for name in ("a", "b")]
    other = [
        make_cache("c", seed=8).path,
        make_cache("d", lengths=(5, 9)).path,
        make_cache("e", precision="bf16").path,
    ]
    prints = [open_cache(path).fingerprint for path in (*same, *other)]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 4


def test_fingerprints_never_change() -> None:
    """Checkpoints name the caches that they were read from by them."""
    golden = Path(__file__).parent / "golden"
    assert open_cache(golden / "int8").fingerprint == "d4b740cae6bebb90"
    assert open_cache(golden / "bf16").fingerprint == "ab5946bd1cddd14f"


def test_a_kind_that_there_is_not_is_damage(tiny: Any) -> None:
    """The statistics have no group for it."""
    path = tiny.path / "train/token/kind/c.0"
    path.write_bytes(encode_chunk(np.full(tiny.manifest.window, 4, np.uint8)))
    with pytest.raises(DamagedCacheError, match=r"token/kind/c.0: expected kinds below 4, found 4"):
        open_cache(tiny.path, check=False)["train"].tokens()


def test_an_altered_log_is_refused(tiny: Any) -> None:
    """samples.jsonl is checked against the journal when it is read."""
    path = tiny.path / "samples.jsonl"
    path.write_bytes(path.read_bytes().replace(b"id-1", b"id-9", 1))
    with pytest.raises(DamagedCacheError, match=r"samples\.jsonl is not what the journal committed"):
        open_cache(tiny.path).samples()


def test_a_manifest_of_the_next_version_is_refused(tiny: Any) -> None:
    """Opening a newer cache says what to do and where."""
    path = tiny.path / "zarr.json"
    document = json.loads(path.read_text())
    document["attributes"]["clt"]["format_version"] = 2
    path.write_text(json.dumps(document))
    with pytest.raises(CacheError, match=r"zarr.json: this clt reads cache format 1, the cache has 2"):
        open_cache(tiny.path)


@IO
def test_fewer_files_may_be_open_than_there_are_shards(tiny: Any, io: str) -> None:
    script = f"""
import resource
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
from clt.cache_format import open_cache
split = open_cache({str(tiny.path)!r}, io={io!r})["train"]
assert sum(len(entry.files) for entry in split.entries) > 40
first = split.read("mlp_out")
assert (split.read("mlp_out") == first).all()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
