"""The writer: what goes in is what is there, in the same bytes however often it was interrupted."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clt.cache_format import CacheError, CacheWriter, open_cache, verify_cache
from clt.cache_format.layout import SITES

SHORT = (30, 40, 50, 9, 70, 20)


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_every_token_is_stored_once_with_its_values(make_cache: Callable[..., Any], precision: str) -> None:
    """Each planned (sample, position) is in its split once, and reads back as the codec's round trip."""
    tiny = make_cache(precision=precision)
    cache = open_cache(tiny.path)
    assert cache.complete
    for name in ("train", "val"):
        split = cache[name]
        found = list(zip(*(split.token_column(c).tolist() for c in ("sample", "position")), strict=True))
        assert len(found) == len(set(found)) == len(split)
        assert set(found) == tiny.planned(name)
        for site in SITES:
            np.testing.assert_array_equal(split.read(site), tiny.expected(split, site))


def test_token_table_keeps_every_column(make_cache: Callable[..., Any]) -> None:
    """A token's id, kind, row and column are those that were added; only the massive tokens are sinks."""
    tiny = make_cache()
    split = open_cache(tiny.path)["val"]
    table = split.tokens()
    for index in range(len(split)):
        sample, position = int(table["sample"][index]), int(table["position"][index])
        columns = tiny.samples[sample].columns
        for name in ("token_id", "kind", "row", "col"):
            assert table[name][index] == columns[name][position]
        assert table["sink"][index] == (position == 0)


def test_a_window_is_a_permutation_of_its_arrival(make_cache: Callable[..., Any]) -> None:
    """Window w of one writer holds the w-th run of arriving tokens, not in arrival order."""
    tiny = make_cache()
    split = open_cache(tiny.path)["train"]
    arrival = [key for key in tiny.true if key[0] == "train" and key[1] != 3]
    found = [
        ("train", *pair)
        for pair in zip(
            split.token_column("sample").tolist(), split.token_column("position").tolist(), strict=True
        )
    ]
    start = 0
    for entry in split.entries:
        window = found[start : start + entry.tokens]
        assert set(window) == set(arrival[start : start + entry.tokens])
        assert window != arrival[start : start + entry.tokens]
        start += entry.tokens


@pytest.mark.parametrize("stop", [1, 2, 5, 8, 11])
def test_a_stopped_harvest_goes_on_byte_for_byte(
    make_cache: Callable[..., Any], tmp_path: Path, stop: int
) -> None:
    """Stopping after any sample and running again gives the files of a run that was never stopped."""
    whole = make_cache("whole")
    parted = whole.at(tmp_path / "parted")
    with parted.writer() as writer:
        parted.feed(writer, stop=stop)
    parted.write()
    assert parted.files() == whole.files()


def test_the_number_of_threads_does_not_show(plan_cache: Callable[..., Any]) -> None:
    """1 and 4 threads write the same bytes."""
    one, four = plan_cache("one", threads=1), plan_cache("four", threads=4)
    one.write()
    four.write()
    assert one.files() == four.files()


def test_running_again_changes_nothing(make_cache: Callable[..., Any]) -> None:
    """A complete cache is left as it is, whatever is fed."""
    tiny = make_cache(lengths=SHORT)
    before = tiny.files()
    tiny.write()
    assert tiny.files() == before


def test_a_lost_document_is_written_again(make_cache: Callable[..., Any]) -> None:
    """zarr.json documents follow from manifest and journal, so running again restores a lost or stale one."""
    tiny = make_cache(lengths=SHORT)
    before = tiny.files()
    (tiny.path / "train/mlp_in/zarr.json").unlink()
    (tiny.path / "val/mlp_in/zarr.json").write_text("{}")
    tiny.write()
    assert tiny.files() == before


def test_another_manifest_is_refused_with_the_differences(
    make_cache: Callable[..., Any], plan_cache: Any
) -> None:
    """Resuming with other arguments names each field with both values, and touches nothing."""
    tiny = make_cache(lengths=SHORT)
    before = tiny.files()
    other = plan_cache(lengths=SHORT, seed=8, source={"model": "other", "tokens": None})
    with pytest.raises(CacheError, match=r"model: 'tiny' -> 'other'; seed: 7 -> 8"):
        other.writer()
    assert tiny.files() == before


@pytest.mark.parametrize("name", ["notes.txt", "samples.jsonl", "journal.jsonl", "zarr.json.bak"])
def test_a_folder_with_other_things_is_refused(plan_cache: Callable[..., Any], name: str) -> None:
    """A folder that holds anything but a cache is left alone."""
    tiny = plan_cache()
    tiny.path.mkdir()
    (tiny.path / name).write_text("mine")
    with pytest.raises(CacheError, match="exists and is not a cache"):
        tiny.writer()
    assert tiny.files() == {name: b"mine"}


def test_a_file_in_the_folders_place_is_refused(plan_cache: Callable[..., Any]) -> None:
    """A path that is a file is not written to."""
    tiny = plan_cache()
    tiny.path.write_text("mine")
    with pytest.raises(CacheError, match="exists and is not a cache"):
        tiny.writer()
    assert tiny.path.read_text() == "mine"


def test_max_tokens_bounds_train_alone(plan_cache: Callable[..., Any]) -> None:
    """Exactly max_tokens of train are stored, the first that arrive; val is not bounded."""
    tiny = plan_cache()
    with CacheWriter(tiny.path, tiny.manifest, max_tokens=150) as writer:
        tiny.feed(writer)
        assert writer.full
        writer.finish()
    cache = open_cache(tiny.path)
    assert len(cache["train"]) == 150
    assert len(cache["val"]) == len(tiny.planned("val"))
    assert verify_cache(str(tiny.path), full=True) == []


def test_skippable_counts_what_a_resumed_batch_need_not_compute(plan_cache: Callable[..., Any]) -> None:
    """After a stop, samples that are committed whole are skipped unseen; one that is cut is delivered."""
    tiny = plan_cache(lengths=(100, 100), window=128)
    first, second = tiny.samples
    with tiny.writer() as writer:
        for sample in (first, second):
            writer.add("train", 0, sample.line, sample.columns, sample.values)
    with tiny.writer() as writer:
        assert writer.cursor("train") == 0
        assert writer.skippable("train", 0, 100)
        assert not writer.skippable("train", 0, 100)
        writer.add("train", 0, second.line, second.columns, second.values)
        writer.finish()
    split = open_cache(tiny.path)["train"]
    assert len(split) == 200
    np.testing.assert_array_equal(split.read("mlp_in"), tiny.expected(split, "mlp_in"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e9])
def test_a_value_that_int8_cannot_hold_is_refused_with_its_sample(
    plan_cache: Callable[..., Any], bad: float
) -> None:
    """NaN, Inf and overflow name sample, layer and site, and nothing of the window is committed."""
    tiny = plan_cache(lengths=(40,))
    sample = tiny.samples[0]
    sample.values["mlp_out"][7, 1, 79] = bad
    with tiny.writer() as writer, pytest.raises(CacheError, match="'id-0 é', layer 2, mlp_out") as caught:
        writer.add("train", 0, sample.line, sample.columns, sample.values)
    assert "\n" not in str(caught.value)
    assert len(open_cache(tiny.path)["train"]) == 0


def test_bf16_keeps_nan_and_infinity(plan_cache: Callable[..., Any]) -> None:
    """Bits given as uint16 come back bit for bit, whatever they mean."""
    tiny = plan_cache(lengths=(64,), precision="bf16", layers=(0,), d_model=1024, window=64)
    sample = tiny.samples[0]
    bits = np.arange(65_536, dtype=np.uint16).reshape(64, 1, 1024)
    values = dict.fromkeys(SITES, bits)
    with tiny.writer() as writer:
        writer.add("train", 0, sample.line, sample.columns, values)
        writer.finish()
    split = open_cache(tiny.path)["train"]
    back = split.read("mlp_in")[:, 0].view(np.uint32) >> np.uint32(16)
    np.testing.assert_array_equal(back, bits[split.token_column("position"), 0])


def test_a_second_writer_is_refused(plan_cache: Callable[..., Any]) -> None:
    """While one writer holds a cache another one is told so; when it is closed the next may write."""
    tiny = plan_cache(lengths=SHORT)
    with tiny.writer(), pytest.raises(CacheError, match="is being written by another process"):
        tiny.writer()
    tiny.write()
    assert verify_cache(str(tiny.path), full=True) == []


def test_a_writer_that_fails_to_open_leaves_no_lock(make_cache: Callable[..., Any]) -> None:
    """After an error in the constructor the same process can open the cache again."""
    tiny = make_cache(lengths=SHORT)
    log = tiny.path / "samples.jsonl"
    data = log.read_bytes()
    log.write_bytes(data[:-5])
    with pytest.raises(CacheError, match="not what the journal committed"):
        tiny.writer()
    log.write_bytes(data)
    tiny.writer().close()


def test_closing_twice_closes_no_stranger(plan_cache: Callable[..., Any], tmp_path: Path) -> None:
    """A second close must not close a file that was opened since under the same number."""
    writer = plan_cache().writer()
    writer.close()
    with open(tmp_path / "mine", "w") as file:
        writer.close()
        file.write("whole")
    assert (tmp_path / "mine").read_text() == "whole"


def test_the_lock_does_not_survive_a_crash(make_cache: Callable[..., Any]) -> None:
    """A writer in another process excludes ours while it lives and not once it was killed."""
    tiny = make_cache(lengths=SHORT)
    holder = (
        "import sys; from pathlib import Path; from clt.cache_format import CacheWriter;"
        "from clt.cache_format.reader import read_manifest; folder = Path(sys.argv[1]);"
        "writer = CacheWriter(folder, read_manifest(folder)); print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", holder, str(tiny.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(CacheError, match="is being written"):
            tiny.writer()
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=20)
        tiny.writer().close()


def test_a_rejected_sample_is_recorded_once(make_cache: Callable[..., Any]) -> None:
    """rejected.jsonl has the reason, samples.jsonl has every other sample, each once."""
    tiny = make_cache()
    cache = open_cache(tiny.path)
    assert cache.rejected() == [{"sample": 3, "reason": "too long"}]
    assert sorted(cache.samples()) == [n for n in range(len(tiny.samples)) if n != 3]
    assert cache.samples()[5] == tiny.samples[5].line
