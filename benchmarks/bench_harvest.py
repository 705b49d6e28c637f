"""Harvest speed, as a ratio to the bare forward pass over the same batches, in turn in one run.

    python benchmarks/bench_harvest.py [--tokens 65536] [--turn 2] [--cuda-layers 8]

On a CPU: the demo's model and data (`make demo` makes them), in float32. Where a CUDA device is at hand, also
random weights in the shape of LLaVA-1.5-7B's Llama (4096 wide, as many layers as asked) on random tokens, in
bfloat16. The bare forward runs the model's body without hooks on batches that lie ready in memory. The
harvest is all of `clt harvest` but loading: it reads, decodes, tokenises and packs, runs the model,
quantises, encodes, writes and syncs, to its last window.

Each runs in a process of its own, and only one at a time: on a CPU the harvest halts after every few batches
(--turn) until the others have done the same ones, because a machine's speed changes within seconds; what its
threads still do then is added to its time, by the processor's seconds. On CUDA it halts only at its end.

"Like for like" is the ratio to a bare forward whose process keeps freed memory as a harvest does
(`clt/heap.py`), which makes the forward pass itself faster: what a harvest adds. "As torch comes" is the
ratio to one that does not: what a user gains or loses. Seconds are by the clock; "CPU" is the ratio of the
processor's seconds. Waiting is what the harvest's own thread waited for.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from clt.harvest.batches import Batch, collate, pack, wants_more
from clt.harvest.config import HarvestConfig
from clt.harvest.feed import Feed
from clt.harvest.model import LoadedModel, load_model
from clt.harvest.rows import Rows, open_rows
from clt.harvest.run import HarvestReport, harvest_rows
from clt.harvest.tokens import PreparedSample
from clt.heap import keep_freed_memory

OUT = Path(__file__).parents[1] / "demo" / "out"
WAITS = ("samples", "device", "copy", "encode", "disk")
VOCABULARY = 32_064
QUIET = 0.05
"""Seconds in which a process that rests does next to nothing."""


class Seconds(NamedTuple):
    clock: float
    processor: float

    @classmethod
    def now(cls) -> "Seconds":
        return cls(time.perf_counter(), time.process_time())

    def since(self, before: "Seconds") -> "Seconds":
        return Seconds(self.clock - before.clock, self.processor - before.processor)

    def plus(self, other: "Seconds") -> "Seconds":
        return Seconds(self.clock + other.clock, self.processor + other.processor)


NONE = Seconds(0, 0)


class Case(NamedTuple):
    name: str
    config: HarvestConfig
    batches: list[Batch]
    rows: Rows
    model: LoadedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--turn", type=int, default=2, help="batches after which a CPU's harvest halts")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of the CPU's case; CUDA's has 8192")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--cuda-layers", type=int, default=8)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--folder", type=Path, help="where caches are made; default: /tmp")
    parser.add_argument("--serve", type=int, help="time the bare forward of this case's batches FROM TO")
    parser.add_argument("--heap", choices=["torch", "kept"], default="torch", help="with --serve")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        if asked.serve is not None:
            serve_bare(next(islice(cases(Path(folder), asked), asked.serve, None)), asked.heap)
            return
        print("| model | bare tok/s, as torch comes | harvest tok/s | like for like | CPU", end=" | ")
        print("as torch comes | CPU", *WAITS, sep=" | ", end=" |\n")
        print("|---" * (7 + len(WAITS)) + "|")
        for number, case in enumerate(cases(Path(folder), asked)):
            print(compare(number, case, Path(folder) / str(number), asked.turn), flush=True)


def cases(folder: Path, asked: argparse.Namespace) -> Iterator[Case]:
    common = {"cache": folder, "val_fraction": 0.0, "window": asked.window, "precision": asked.precision}
    if not (OUT / "model").is_dir():
        sys.exit(f"error: expected the demo's model in {OUT}, found none; run `make demo` first")
    demo = HarvestConfig(
        model=str(OUT / "model"),
        dataset=str(OUT / "data" / "train.jsonl"),
        batch_tokens=asked.batch_tokens,
        dtype="float32",
        device="cpu",
        **common,
    )
    yield prepare("demo, CPU", demo, asked.tokens)
    if torch.cuda.is_available():
        save_llama(folder / "llama", asked.cuda_layers)
        save_texts(folder / "texts.jsonl", 16 * asked.tokens)
        llama = HarvestConfig(
            model=str(folder / "llama"), dataset=str(folder / "texts.jsonl"), dtype="bfloat16", **common
        )
        yield prepare(
            f"Llama of 7B's shape, {asked.cuda_layers} layers, {torch.cuda.get_device_name()}",
            llama,
            8 * asked.tokens,
        )


def prepare(name: str, config: HarvestConfig, tokens: int) -> Case:
    """Whole samples of about `tokens` tokens, in the batches that the harvest will make of them."""
    rows, model = open_rows(config.dataset, config.split), load_model(config)
    samples: list[PreparedSample] = []
    with closing(Feed(rows, model, config, {"train": 0, "val": 0}).reads()) as feed:
        for read in feed:
            assert read.prepared is not None, read.reason
            samples.append(read.prepared)
            if sum(sample.length for sample in samples) >= tokens:
                break
    config = HarvestConfig(**{**vars(config), "max_samples": len(samples)})
    return Case(name, config, list(batches(samples, config)), rows, model)


def batches(samples: list[PreparedSample], config: HarvestConfig) -> Iterator[Batch]:
    """As the harvest pools and packs them."""
    pool: list[PreparedSample] = []
    for sample in [*samples, None]:
        if sample is not None:
            pool.append(sample)
        if pool and (sample is None or not wants_more(pool, pool[0].number, config.batch_tokens)):
            yield from (collate(part) for part in pack(pool, config.batch_tokens, config.shuffle_seed))
            pool = []


class Bare:
    """Another process, which times the bare forward of a case's batches when asked."""

    def __init__(self, number: int, heap: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--serve", str(number), "--heap", heap]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.took = NONE

    def __enter__(self) -> "Bare":
        self.run(0, 1)
        self.took = NONE
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def run(self, start: int, stop: int) -> None:
        assert self._process.stdin
        assert self._process.stdout
        print(start, stop, file=self._process.stdin, flush=True)
        self.took = self.took.plus(Seconds(*map(float, self._process.stdout.readline().split())))


def serve_bare(case: Case, heap: str) -> None:
    if heap == "kept":
        keep_freed_memory()
    for line in sys.stdin:
        start, stop = map(int, line.split())
        began = Seconds.now()
        run_bare(case.model, case.batches[start:stop])
        print(*Seconds.now().since(began), flush=True)


class Turns:
    """The harvest's seconds; halts it before a batch, until the bare forwards have caught up with it."""

    def __init__(self, others: list[Bare], size: int | None) -> None:
        self._others, self._size = others, size
        self._came, self._compared = 0, 0
        self.took, self.halted = NONE, 0.0
        self._began = Seconds.now()

    def before_batch(self, *_: object) -> None:
        if self._size and self._came >= self._compared + self._size:
            began = time.perf_counter()
            self.halt()
            self.halted += time.perf_counter() - began
        self._came += 1

    def halt(self) -> None:
        self.took = self.took.plus(Seconds.now().since(self._began))
        rest = wait_until_quiet()
        self.took = self.took.plus(Seconds(rest, rest))
        for other in self._others:
            other.run(self._compared, self._came)
        self._compared = self._came
        self._began = Seconds.now()


def wait_until_quiet() -> float:
    """Seconds of the processor that this process's threads take until they rest."""
    began = time.process_time()
    while True:
        before = time.process_time()
        time.sleep(QUIET)
        if time.process_time() - before < QUIET / 10:
            return time.process_time() - began


def compare(number: int, case: Case, cache: Path, turn: int) -> str:
    """One line of the table."""
    tokens = sum(int(batch.keep.sum()) for batch in case.batches)
    on_device = case.model.device.type != "cpu"
    config = HarvestConfig(**{**vars(case.config), "cache": cache})
    with ExitStack() as stack:
        others = [stack.enter_context(Bare(number, heap)) for heap in ("torch", "kept")]
        turns = Turns(others, None if on_device else turn)
        stack.callback(case.model.body.register_forward_pre_hook(turns.before_batch).remove)
        report = harvest_rows(config, case.rows, case.model)
        turns.halt()
    assert sum(report.tokens.values()) == tokens, "not the same tokens"
    cells = [case.name, *(f"{tokens / took.clock:.0f}" for took in (others[0].took, turns.took))]
    for other in reversed(others):
        cells += [f"{mine / ours:.3f}" for mine, ours in zip(other.took, turns.took, strict=True)]
    waits = shares(report, turns)
    return f"| {' | '.join([*cells, *(f'{waits[name]:.1%}' for name in WAITS)])} |"


def shares(report: HarvestReport, turns: Turns) -> dict[str, float]:
    """Of its time that the harvest waited; it is halted while it waits for the device."""
    halted = {"device": turns.halted}
    return {name: (report.seconds[name] - halted.get(name, 0)) / turns.took.clock for name in WAITS}


def run_bare(model: LoadedModel, batches: list[Batch]) -> None:
    dtype = next(model.body.parameters()).dtype
    for batch in batches:
        inputs = {
            name: value.to(model.device, dtype if value.is_floating_point() else None)
            for name, value in batch.inputs.items()
        }
        with torch.inference_mode():
            model.body(**inputs, use_cache=False)
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def save_llama(folder: Path, layers: int) -> None:
    """Random weights in LLaVA-1.5-7B's shape, with a tokenizer of whole words."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=4096,
        intermediate_size=11_008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
    )
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    words = {f"w{number}": number for number in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="w1").save_pretrained(folder)


def save_texts(path: Path, tokens: int) -> None:
    """Texts as long as LLaVA-Instruct's samples are with their 576 image tokens."""
    rng = np.random.default_rng(0)
    with open(path, "w") as file:
        while tokens > 0:
            length = int(576 + min(400, rng.lognormal(4.5, 0.7)))
            text = " ".join(f"w{number}" for number in rng.integers(2, VOCABULARY, length))
            file.write(json.dumps({"text": text}) + "\n")
            tokens -= length


if __name__ == "__main__":
    main()
