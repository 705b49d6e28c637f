"""Samples prepared ahead: how many, in which order, and what becomes of a thread that fails."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
from tokenizers import normalizers, processors

from clt.harvest.config import HarvestConfig
from clt.harvest.feed import Feed, Read, cores
from clt.harvest.model import LoadedProcessor, load_processor
from clt.harvest.rows import Numbered, Table


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> LoadedProcessor:
    folder = tiny.save_llava(tmp_path_factory.mktemp("feed") / "model")
    return load_processor(HarvestConfig(model=str(folder), dataset="", cache=Path()))


def feed_of(processor: LoadedProcessor, rows: list[Any], **options: Any) -> Feed:
    config = HarvestConfig(
        model="m", dataset="d", cache=Path(), val_fraction=0.0, **{"workers": 2, **options}
    )
    return Feed(Table(rows, "", None), processor, config, {"train": 0, "val": 0})


def test_a_whole_pool_is_prepared_ahead(processor: LoadedProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the model runs one pool, the next one is read; before, 16 samples a thread are."""
    read: list[int] = []

    def fake(self: Feed, numbered: Numbered) -> Read:
        read.append(numbered.number)
        return Read(numbered.number, 0, "", "train", None, None)

    monkeypatch.setattr(Feed, "read", fake)
    feed = feed_of(processor, [{}] * 500)
    reads = feed.reads()
    assert next(reads).number == 0
    wait_for(read, 33)
    feed.keep_ahead(200)
    assert next(reads).number == 1
    wait_for(read, 202)
    time.sleep(0.05)
    assert len(read) == 202
    assert [one.number for one in reads] == list(range(2, 500))


def wait_for(read: list[int], count: int) -> None:
    deadline = time.monotonic() + 20
    while len(read) < count and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(read) >= count


def test_samples_come_in_order_whoever_is_quicker(
    processor: LoadedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = threading.Event()
    prepare = Feed.read

    def slow(self: Feed, numbered: Numbered) -> Read:
        if numbered.number == 0:
            first.wait(20)
        if numbered.number == 5:
            first.set()
        return prepare(self, numbered)

    monkeypatch.setattr(Feed, "read", slow)
    rows = [{"id": str(number), "text": f"a red circle {number}"} for number in range(40)]
    found = list(feed_of(processor, rows).reads())
    assert [one.number for one in found] == list(range(40))
    assert sorted(int(one.id) for one in found) == list(range(40))


def test_a_text_that_leaves_no_token_is_a_reason(processor: LoadedProcessor) -> None:
    """A zero-width space is no blank to Python, and nothing to this tokenizer, which has no BOS."""
    tokenizer = tiny.make_tokenizer([])
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    speechless = replace(processor, tokenizer=tokenizer, processor=tokenizer, image_token=None)
    reads = {one.row: one for one in feed_of(speechless, [{"text": "\u200b"}, {"text": "a"}]).reads()}
    assert reads[0].reason == "no tokens"
    assert reads[1].prepared.length == 1


class Hostile(dict[str, Any]):
    """A row whose library fails in a way that nobody foresaw."""

    def items(self) -> Any:
        raise ZeroDivisionError("by a library")


def test_a_fault_that_nobody_foresaw_is_a_reason(processor: LoadedProcessor) -> None:
    """It costs one sample, and not the run."""
    reads = {one.row: one for one in feed_of(processor, [{"text": "a"}, Hostile(), {"text": "b"}]).reads()}
    assert reads[1].reason == "unforeseen ZeroDivisionError: by a library"
    assert [reads[row].reason for row in (0, 2)] == [None, None]


class DamagedTable(list[Any]):
    def __getitem__(self, number: Any) -> Any:
        if number == 1:
            raise OSError("block 7 is damaged")
        return super().__getitem__(number)


def test_a_damaged_block_of_a_table_costs_its_rows(processor: LoadedProcessor) -> None:
    feed = feed_of(processor, DamagedTable([{"text": "a"}] * 3))
    reasons = {one.row: one.reason for one in feed.reads()}
    assert reasons == {0: None, 1: "the row cannot be read: OSError: block 7 is damaged", 2: None}


def test_what_no_sample_can_mend_ends_the_run(
    processor: LoadedProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model without a chat template, for one; the threads are gone afterwards."""

    def fail(*arguments: Any) -> Any:
        raise ValueError("m has no chat template")

    monkeypatch.setattr("clt.harvest.feed.prepare", fail)
    with pytest.raises(ValueError, match="no chat template"):
        list(feed_of(processor, [{"text": "a"}] * 100).reads())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clt-read")]


def test_closing_stops_the_threads(processor: LoadedProcessor) -> None:
    reads = feed_of(processor, [{"text": "a red circle"}] * 500).reads()
    next(reads)
    reads.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("clt-read")]


def test_processes_of_torchrun_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert cores() == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert cores() == 2
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "32")
    assert cores() == 1
