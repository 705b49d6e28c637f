"""Samples read and prepared ahead of the model, by threads, in harvest order.

Threads, not processes: decoding, resizing and tokenising release Python's lock, and a prepared picture is
megabytes that would have to be copied between processes. Where there are several, each has its own copy of
the processor, because fast tokenizers refuse to be shared.
"""

import copy
import os
import threading
from collections import deque
from collections.abc import Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

from .config import HarvestConfig
from .model import LoadedProcessor
from .pictures import PictureSource, load_picture
from .rows import BadSample, Numbered, Rows
from .samples import Sample, is_val, parse_sample, sample_id
from .tokens import PreparedSample, prepare

AHEAD = 16
"""Samples in preparation or waiting for each thread, before the first pool is known."""
MOST_AHEAD = 1024
"""Prepared pictures are megabytes each."""
MOST_THREADS = 8


class Read(NamedTuple):
    """What became of one row."""

    number: int
    """Of the sample, over all ranks."""
    row: int
    id: str
    split: str | None
    """None where the row is not readable."""
    prepared: PreparedSample | None
    """None where the sample is bad, or committed already."""
    reason: str | None
    """Why the sample is bad."""


class Feed:
    """Every sample of this rank, from the earliest cursor on.

    cursors: by split, the place in this rank's order from which on samples are wanted; what lies before is
    given without being prepared.
    """

    def __init__(
        self, rows: Rows, model: LoadedProcessor, config: HarvestConfig, cursors: Mapping[str, int]
    ) -> None:
        self._rows, self._model, self._config, self._cursors = rows, model, config, cursors
        self._source = PictureSource(
            config.image_root or rows.folder, config.allow_outside, config.fetch_urls
        )
        self._local = threading.local()
        self._local.model = model  # the maker's own; others copy it, which takes a while
        self._threads = config.workers or default_threads()
        self._ahead = AHEAD * self._threads

    def keep_ahead(self, samples: int) -> None:
        """Have at least so many ready, for they are asked for at once."""
        self._ahead = max(self._ahead, min(samples, MOST_AHEAD))

    def reads(self) -> Generator[Read]:
        """The samples in order; close it to stop the threads."""
        config = self._config
        start = min(self._cursors.values()) * config.world_size + config.rank
        waiting: deque[Future[Read]] = deque()
        pool = ThreadPoolExecutor(self._threads, "clt-read")
        try:
            for numbered in self._rows.walk(config.shuffle_seed, start, config.world_size):
                if config.max_samples is not None and numbered.number >= config.max_samples:
                    break
                waiting.append(pool.submit(self.read, numbered))
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def read(self, numbered: Numbered) -> Read:
        """Everything that is done to a row before the model sees it."""
        number, row_number, _ = numbered
        name, split = f"row-{row_number}", None
        try:
            row = numbered.read()
            name = sample_id(row, row_number)
            split = "val" if is_val(name, self._config.shuffle_seed, self._config.val_fraction) else "train"
            if number // self._config.world_size < self._cursors[split]:
                return Read(number, row_number, name, split, None, None)
            sample = self._with_pictures(parse_sample(row, row_number, self._config.text_column))
            prepared = prepare(sample, number, self._own_model(), self._config)
            prepared.line["row"] = row_number
            return Read(number, row_number, name, split, prepared, None)
        except BadSample as fault:
            reason = str(fault)
        except ValueError:
            raise  # about the model or what was asked for: no other sample will do
        except Exception as fault:  # from inside some library: one odd sample must not end the run
            reason = f"unforeseen {type(fault).__name__}: {fault}"
        reason = reason.encode(errors="backslashreplace").decode()
        return Read(number, row_number, name, split, None, reason)

    def _with_pictures(self, sample: Sample) -> Sample:
        pictures = [load_picture(reference, self._source) for reference in sample.references]
        return replace(sample, pictures=pictures)

    def _own_model(self) -> LoadedProcessor:
        if not hasattr(self._local, "model"):
            alone = self._threads == 1  # the maker takes what such a thread has read, and reads no more
            self._local.model = self._model if alone else self._copied_model()
        model: LoadedProcessor = self._local.model
        return model

    def _copied_model(self) -> LoadedProcessor:
        processor = copy.deepcopy(self._model.processor)
        tokenizer = getattr(processor, "tokenizer", processor)
        return replace(self._model, processor=processor, tokenizer=tokenizer)


def default_threads() -> int:
    """Half the cores that this process may use: the model and the encoders want the others."""
    return max(1, min(MOST_THREADS, cores() // 2))


def cores() -> int:
    """Of this process; torchrun's processes of one machine share its cores."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
