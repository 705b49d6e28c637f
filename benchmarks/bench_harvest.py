"""Harvest speed, as a ratio to the bare forward pass over the same batches, in turn in one run.

    python benchmarks/bench_harvest.py [--tokens 24576] [--repeats 3] [--cuda-layers 8]

On a CPU: the demo's model and data (`make demo` makes them), in float32. Where a CUDA device is at hand, also
random weights in the shape of LLaVA-1.5-7B's Llama (4096 wide, as many layers as asked) on random tokens, in
bfloat16. The bare forward runs the model's body without hooks on batches that lie ready in memory, in the
process and with the heap of the harvest. The harvest is all of `clt harvest` but loading: it reads, decodes,
tokenises and packs, runs the model, quantises, encodes, writes and syncs, to its last window.

On a CPU a harvest has the C library keep freed memory (`clt/heap.py`), which makes the forward pass itself
faster. "Apart" is the ratio to a bare forward without that, in a process of its own, as torch and
transformers come: what a user gains or loses, but not what the harvest adds to a forward pass.

Ratios are medians of the rounds'. Seconds are by the clock; "CPU" is the ratio of the processor's seconds,
which other work on the machine changes less. Waiting is what the harvest's own thread waited for.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
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

OUT = Path(__file__).parents[1] / "demo" / "out"
WAITS = ("samples", "device", "copy", "encode", "disk")
VOCABULARY = 32_064


class Timed(NamedTuple):
    clock: float
    processor: float


class Case(NamedTuple):
    name: str
    config: HarvestConfig
    """Its cache is replaced by another folder each time."""
    batches: list[Batch]
    rows: Rows
    model: LoadedModel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=24_576)
    parser.add_argument("--repeats", type=int, default=3, help="rounds, after one that warms up")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of the CPU's case; CUDA's has 8192")
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--cuda-layers", type=int, default=8)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--folder", type=Path, help="where caches are made; default: /tmp")
    parser.add_argument("--serve", type=int, help="time the bare forward of this case for each line of input")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        if asked.serve is not None:
            serve_bare(next(islice(cases(Path(folder), asked), asked.serve, None)))
            return
        print(f"| model | bare tok/s | harvest tok/s | ratio | CPU | apart | {' | '.join(WAITS)} |")
        print("|---" * (6 + len(WAITS)) + "|")
        for number, case in enumerate(cases(Path(folder), asked)):
            with bare_apart(number) as bare:
                print(compare(case, bare, Path(folder) / "cache", asked.repeats), flush=True)


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
        save_texts(folder / "texts.jsonl", 40 * asked.tokens)
        llama = HarvestConfig(
            model=str(folder / "llama"), dataset=str(folder / "texts.jsonl"), dtype="bfloat16", **common
        )
        yield prepare(
            f"Llama of 7B's shape, {asked.cuda_layers} layers, {torch.cuda.get_device_name()}",
            llama,
            20 * asked.tokens,
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


def serve_bare(case: Case) -> None:
    for _ in sys.stdin:
        print(*timed(lambda: run_bare(case)), flush=True)


@contextmanager
def bare_apart(number: int) -> Iterator[Callable[[], Timed]]:
    """Another process, which times the bare forward of that case when asked."""
    command = [sys.executable, __file__, *sys.argv[1:], "--serve", str(number)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin
        assert process.stdout

        def ask() -> Timed:
            print(file=process.stdin, flush=True)
            return Timed(*map(float, process.stdout.readline().split()))

        yield ask


def compare(case: Case, bare_apart: Callable[[], Timed], cache: Path, repeats: int) -> str:
    """One line of the table."""
    tokens = sum(int(batch.keep.sum()) for batch in case.batches)
    bare, whole, apart, reports = [], [], [], []
    for number in range(repeats + 1):
        apart.append(bare_apart())
        # a new folder: ext4 looks for files of its own in vain, where as many were deleted just before
        whole.append(timed(lambda to=cache / str(number): reports.append(run_harvest(case, to))))
        bare.append(timed(lambda: run_bare(case)))
        assert sum(reports[-1].tokens.values()) == tokens, "not the same tokens"
    bare, whole, apart, reports = bare[1:], whole[1:], apart[1:], reports[1:]
    waited = [
        median(report.seconds[name] / ours.clock for report, ours in zip(reports, whole, strict=True))
        for name in WAITS
    ]
    pairs = [*zip(bare, whole, strict=True)]
    cells = [case.name, *(f"{tokens / median(one.clock for one in times):.0f}" for times in (bare, whole))]
    cells.append(f"{median(one.clock / ours.clock for one, ours in pairs):.3f}")
    cells.append(f"{median(one.processor / ours.processor for one, ours in pairs):.3f}")
    cells.append(f"{median(one.clock / ours.clock for one, ours in zip(apart, whole, strict=True)):.3f}")
    return f"| {' | '.join([*cells, *(f'{share:.1%}' for share in waited)])} |"


def run_bare(case: Case) -> None:
    device = case.model.device
    dtype = next(case.model.body.parameters()).dtype
    for batch in case.batches:
        inputs = {
            name: value.to(device, dtype if value.is_floating_point() else None)
            for name, value in batch.inputs.items()
        }
        with torch.inference_mode():
            case.model.body(**inputs, use_cache=False)
    if device.type == "cuda":
        torch.cuda.synchronize()


def run_harvest(case: Case, cache: Path) -> HarvestReport:
    config = HarvestConfig(**{**vars(case.config), "cache": cache})
    return harvest_rows(config, case.rows, case.model)


def timed(work: Callable[[], None]) -> Timed:
    began, spent = time.perf_counter(), time.process_time()
    work()
    return Timed(time.perf_counter() - began, time.process_time() - spent)


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
