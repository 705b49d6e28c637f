"""Rate, noise and speed of ways to store activations, on activations of the demo's language model.

    python benchmarks/bench_codec.py [--tokens 4096] [--width 4096] [--activations FILE.npz]

Rates and noise are measured at the model's own width on all tokens, layers and both sites; speeds on one core
with tokens side by side up to --width channels (LLaVA's), in bf16-equivalent bytes, best of several runs.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numcodecs import Blosc, Zstd
from numcodecs.pcodec import PCodec

from clt.cache_format import bf16, codec, huffman, int8
from clt.cache_format.layout import BLOCK, CHUNK, SITES

Array = npt.NDArray[Any]
SEQUENCE = 512
SINK_RATIO = 50.0
REPEATS = 7
COLUMNS = ("encoding", "bits a value", "entropy", "Shannon", "noise: worst", "mean", "worst, no sinks")
COLUMNS += ("worst, sinks alone", "encode GB/s", "decode GB/s")
LEGEND = """
bits a value: scales included. entropy: of order 0, a layer and site at a time, codes and scales (bf16: the
exponent, and 8 bits for sign and mantissa). Shannon: bits a Gaussian needs at each layer's noise. noise: FVU
of the stored against the true values, in 1e-3, over all layers and sites; sinks alone: against the mean of
all tokens. Speeds: seconds of one thread."""


class Candidate(NamedTuple):
    name: str
    quantise: Callable[[Array], tuple[Array, ...]]
    """(token, d_model) float32 -> the arrays that are stored"""
    restore: Callable[..., Array]
    encode: Callable[[Array], Any]
    """one chunk of one stored array"""
    decode: Callable[[Any, Array], Any]


class Sample(NamedTuple):
    values: dict[str, Array]
    """by site: (layer, token, d_model) float32"""
    sink: Array
    """(token,): first of its sequence, or massive in some layer"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--width", type=int, default=4096, help="channels for the speeds; 0: the model's own")
    parser.add_argument("--activations", type=Path, help=".npz with x and y (token, layer, d_model) float32")
    asked = parser.parse_args()
    sites = load(asked.activations, asked.tokens) if asked.activations else activations(asked.tokens)
    norm = np.linalg.norm(sites["mlp_out"], axis=2)
    massive = (norm > SINK_RATIO * np.median(norm, axis=1, keepdims=True)).any(axis=0)
    sample = Sample(sites, massive | (np.arange(norm.shape[1]) % SEQUENCE == 0))
    layers, tokens, width = sites["mlp_in"].shape
    print(f"{tokens} tokens ({sample.sink.sum()} sinks), {layers} layers, {width} channels; ", end="")
    print(f"speeds at {asked.width or width} channels")
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for candidate in [*int8_candidates(8), *int8_candidates(16), *bf16_candidates()]:
        print(row(candidate, sample, asked.width or width), flush=True)
    print(LEGEND)


def activations(tokens: int) -> dict[str, Array]:
    """MLP inputs and outputs of prose, in sequences of SEQUENCE tokens."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))
    import torch
    from data import prose
    from llava import make_llava, make_tokenizer

    tokenizer = make_tokenizer()
    ids: list[int] = []
    for text in prose():
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= tokens:
            break
    model = make_llava(tokenizer, None).model.language_model
    caught: dict[str, list[Array]] = {site: [] for site in SITES}

    def catch(module: Any, arguments: tuple[Any, ...], output: Any) -> None:
        for site, tensor in zip(SITES, (arguments[0], output), strict=True):
            caught[site].append(tensor[0].float().numpy())

    for layer in model.layers:
        layer.mlp.register_forward_hook(catch)
    with torch.inference_mode():
        for start in range(0, tokens, SEQUENCE):
            model(input_ids=torch.tensor([ids[start : min(start + SEQUENCE, tokens)]]))
    n = len(model.layers)
    return {
        site: np.stack([np.concatenate(parts[layer::n]) for layer in range(n)])
        for site, parts in caught.items()
    }


def load(path: Path, tokens: int) -> dict[str, Array]:
    with np.load(path) as held:
        return {
            site: np.ascontiguousarray(held[name][:tokens].swapaxes(0, 1))
            for site, name in zip(SITES, "xy", strict=True)
        }


def int8_candidates(divisor: int) -> Iterator[Candidate]:
    def rms(blocks: Array) -> Array:
        return np.sqrt(np.square(blocks).mean(axis=2))

    def mean_abs(blocks: Array) -> Array:
        return np.abs(blocks).mean(axis=2) * np.float32(int8.GAUSSIAN)

    def of_token(typical: Callable[[Array], Array]) -> Callable[[Array], Array]:
        return lambda blocks: typical(blocks.reshape(len(blocks), 1, -1))

    def lesser(blocks: Array) -> Array:
        return np.minimum(rms(blocks), of_token(rms)(blocks))

    rules = {"rms of the block": rms, "rms of the token": of_token(rms), "lesser of the two": lesser}
    rules["mean size of the block"] = mean_abs
    zstd = (Zstd(1, checksum=True).encode, Zstd(1).decode)
    for name, typical in rules.items():
        quantise = stepwise(lambda blocks, typical=typical: typical(blocks) / np.float32(divisor))
        yield Candidate(f"int8 /{divisor}, {name}, zstd-1", quantise, int8.dequantise, *zstd)
    shipped = f"int8 /{divisor}, mean size of the token"

    def quantise_shipped(values: Array) -> tuple[Array, ...]:
        return int8.quantise(values, divisor)

    ours = (codec.encode_chunk, lambda stored, out: codec.decode_chunk(memoryview(stored), out))
    yield Candidate(f"**{shipped}, Huffman**", quantise_shipped, int8.dequantise, *ours)
    yield Candidate(f"{shipped}, zstd, no search", quantise_shipped, int8.dequantise, by_library, ours[1])
    yield Candidate(f"{shipped}, zstd-1", quantise_shipped, int8.dequantise, *zstd)
    yield from blocks_and_centring(divisor, of_token(mean_abs), zstd)
    others = {"zstd-3": Zstd(3, checksum=True), "blosc bitshuffle zstd-1": Blosc("zstd", 1, Blosc.BITSHUFFLE)}
    for name, coder in others.items():
        yield Candidate(f"{shipped}, {name}", quantise_shipped, int8.dequantise, coder.encode, coder.decode)


def by_library(chunk: Array) -> bytes:
    """As where huffman.c is not compiled."""
    if chunk.dtype != np.int8:
        return codec.encode_chunk(chunk)
    compiled, huffman.COMPILED = huffman.COMPILED, False
    try:
        return codec.encode_chunk(chunk)
    finally:
        huffman.COMPILED = compiled


def blocks_and_centring(
    divisor: int, typical: Callable[[Array], Array], coder: tuple[Any, Any]
) -> Iterator[Candidate]:
    """The shipped step with other blocks for what does not fit, and with each channel's mean taken away."""

    def step(blocks: Array) -> Array:
        return typical(blocks) / np.float32(divisor)

    for block in (16, 64, None):
        name = f"blocks of {block}" if block else "one block a vector"
        yield Candidate(f"int8 /{divisor}, {name}, zstd-1", stepwise(step, block), by_block, *coder)

    def centred(values: Array) -> tuple[Array, ...]:
        mean = values.mean(axis=0, keepdims=True).astype(np.float16)
        return *stepwise(step)(values - mean.astype(np.float32)), mean

    def restore(codes: Array, scale: Array, mean: Array) -> Array:
        return by_block(codes, scale) + mean.astype(np.float32)

    yield Candidate(f"int8 /{divisor}, centred, zstd-1", centred, restore, *coder)


def by_block(codes: Array, scale: Array) -> Array:
    return codes * np.repeat(scale.astype(np.float32), codes.shape[1] // scale.shape[1], axis=1)


def stepwise(
    step: Callable[[Array], Array], block: int | None = BLOCK
) -> Callable[[Array], tuple[Array, ...]]:
    """int8 with this step where it fits and absmax / 127 where it does not, as plain numpy."""

    def quantise(values: Array) -> tuple[Array, ...]:
        blocks = values.reshape(len(values), -1, block or values.shape[1])
        wanted = np.maximum(step(blocks), np.abs(blocks).max(axis=2) / np.float32(127))
        scale, _ = int8.round_up_to_half(wanted)
        codes = np.rint(blocks / np.maximum(scale, np.float16(1e-7)).astype(np.float32)[..., None])
        return codes.astype(np.int8).reshape(values.shape), scale

    return quantise


def bf16_candidates() -> Iterator[Candidate]:
    def bits(values: Array) -> tuple[Array, ...]:
        return (bf16.to_bf16_bits(values),)

    coders: dict[str, Any] = {
        "blosc bitshuffle lz4": Blosc("lz4", 5, Blosc.BITSHUFFLE),
        "blosc bitshuffle zstd-1": Blosc("zstd", 1, Blosc.BITSHUFFLE),
        "blosc byteshuffle zstd-1": Blosc("zstd", 1, Blosc.SHUFFLE),
        "zstd-1": Zstd(1),
        "pcodec": PCodec(),
    }
    for name, coder in coders.items():
        yield Candidate(f"bf16 {name}", bits, bf16.from_bf16_bits, coder.encode, coder.decode)
    yield Candidate(
        "bf16 exponent byte zstd-1, rest raw", bits, bf16.from_bf16_bits, encode_planes, decode_planes
    )

    def decode(stored: bytes, out: Array) -> None:
        codec.decode_chunk(memoryview(stored), out)

    yield Candidate(
        "**bf16 blosc, split, high byte Huffman**", bits, bf16.from_bf16_bits, codec.encode_chunk, decode
    )


def encode_planes(chunk: Array) -> bytes:
    exponent = (chunk >> 7).astype(np.uint8)
    rest = (chunk & 0x7F | chunk >> 8 & 0x80).astype(np.uint8)
    return rest.tobytes() + bytes(Zstd(1).encode(exponent))


def decode_planes(stored: bytes, out: Array) -> None:
    rest = np.frombuffer(stored, np.uint8, out.size).reshape(out.shape)
    exponent = np.empty(out.shape, np.uint8)
    Zstd(1).decode(memoryview(stored)[out.size :], exponent)
    np.left_shift(exponent, 7, out=out, dtype=np.uint16)
    out |= rest & np.uint8(0x7F)
    out |= np.left_shift(rest & np.uint8(0x80), 8, dtype=np.uint16)


def row(candidate: Candidate, sample: Sample, width: int) -> str:
    rate, entropy, noise = [], [], []
    for layers in sample.values.values():
        for values in layers:
            stored = candidate.quantise(values)
            size = sum(len(candidate.encode(chunk)) for array in stored for chunk in chunks(array))
            rate.append(8 * size / values.size)
            entropy.append(order_0(stored) / values.size)
            noise.append(fvus(values, candidate.restore(*stored), sample.sink))
    fvu = np.array(noise)
    worst, mean = fvu.max(axis=0), fvu.mean(axis=0)
    if np.issubdtype(stored[0].dtype, np.uint16):  # rounding to bf16 is the model's doing, not the encoding's
        cells = [f"{np.mean(rate):.2f}", f"{np.mean(entropy):.2f}", "-", *["0"] * 4]
    else:
        shannon = np.mean(np.log2(1 / fvu[:, 0])) / 2
        cells = [f"{np.mean(rate):.2f}", f"{np.mean(entropy):.2f}", f"{shannon:.2f}"]
        cells += [f"{1e3 * x:.2f}" for x in (worst[0], mean[0], worst[1], worst[2])]
    cells += [f"{speed:.2f}" for speed in speeds(candidate, side_by_side(sample, width))]
    return f"| {candidate.name} | " + " | ".join(cells) + " |"


def chunks(array: Array) -> list[Array]:
    return [np.ascontiguousarray(array[start : start + CHUNK]) for start in range(0, len(array), CHUNK)]


def order_0(stored: tuple[Array, ...]) -> float:
    """Bits of all stored numbers."""
    if stored[0].dtype == np.uint16:
        return entropy_of(stored[0] >> 7 & 0xFF) + 8 * stored[0].size
    return sum(entropy_of(array) for array in stored)


def entropy_of(array: Array) -> float:
    counts = np.bincount(array.view(f"u{array.itemsize}").ravel())
    counts = counts[counts > 0]
    return float((counts * np.log2(array.size / counts)).sum())


def fvus(true: Array, stored: Array, sink: Array) -> tuple[float, float, float]:
    """Over all tokens, over all but the sinks, and of the sinks (against the mean of all)."""
    lost = np.square(stored - true, dtype=np.float64).sum(axis=1)
    whole = np.square(true - true.mean(axis=0, dtype=np.float64)).sum(axis=1)
    plain = true[~sink]
    rest = np.square(plain - plain.mean(axis=0, dtype=np.float64)).sum()
    return lost.sum() / whole.sum(), lost[~sink].sum() / rest, lost[sink].sum() / whole[sink].sum()


def side_by_side(sample: Sample, width: int) -> list[Array]:
    """A few layers of both sites as one wide vector a token, 2 chunks each."""
    wide = []
    for layers in sample.values.values():
        for values in layers[:: max(1, len(layers) // 4)]:
            copies = -(-width // values.shape[1])
            rows = min(2 * CHUNK, len(values) // copies)
            parts = values[: rows * copies].reshape(copies, rows, -1)
            wide.append(np.ascontiguousarray(np.concatenate(parts, axis=1)[:, :width]))
    return wide


def speeds(candidate: Candidate, samples: list[Array]) -> tuple[float, float]:
    """Encode (values to bytes) and decode (bytes to stored numbers), GB/s of bf16-equivalent bytes."""
    size = sum(2 * values.size for values in samples)

    def encode() -> list[Any]:
        return [
            candidate.encode(chunk)
            for values in samples
            for array in candidate.quantise(values)
            for chunk in chunks(array)
        ]

    room = [np.empty_like(c) for values in samples for a in candidate.quantise(values) for c in chunks(a)]
    pairs = list(zip(encode(), room, strict=True))

    def decode() -> None:
        for stored, out in pairs:
            candidate.decode(stored, out)

    return size / best(encode) / 1e9, size / best(decode) / 1e9


def best(work: Callable[[], Any]) -> float:
    seconds = []
    for _ in range(REPEATS):
        began = time.thread_time()
        work()
        seconds.append(time.thread_time() - began)
    return min(seconds)


if __name__ == "__main__":
    main()
