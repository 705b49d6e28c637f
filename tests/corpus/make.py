"""How the corpus of bad bytes was made; it is only ever added to.

    python tests/corpus/make.py FOLDER

Hand-picked inputs, and for each kind of refusal the smallest that Hypothesis found by altering sound ones.
"""

import json
import re
import struct
import sys
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_format_corpus import GOLDEN, SLOTS, refusal

from clt.cache_format.codec import Frames, encode_chunk
from clt.cache_format.files import checksum
from clt.cache_format.shard import shard_parts

HUGE = "1" + "0" * 400
ROOT = (GOLDEN / "zarr.json").read_bytes()
JOURNAL = (GOLDEN / "journal.jsonl").read_bytes()
FIELDS = {
    "width-huge": ("d_model", HUGE),
    "width-one-too-many": ("d_model", "1048577"),
    "width-negative": ("d_model", "-66"),
    "width-no-integer": ("d_model", "66.5"),
    "layers-very-many": ("layers", "[" + ",".join(map(str, range(5000))) + "]"),
    "layers-negative": ("layers", "[-1, 4]"),
    "layers-nested-deep": ("layers", "[" * 3000 + "]" * 3000),
    "window-huge": ("window", "9223372036854775807"),
    "window-negative": ("window", "-64"),
    "writers-very-many": ("world_size", "1000000000"),
    "writers-negative": ("world_size", "-1"),
    "precision-unknown-codec": ("precision", '"pickle"'),
    "precision-object": ("precision", '{"name":"pickle"}'),
    "divisor-infinite": ("step_divisor", "1e999"),
    "divisor-nan": ("step_divisor", "NaN"),
    "key-twice": ("seed", '5,"seed":6'),
    "source-object": ("source", '{"a":{"__reduce__":"os.system"}}'),
    "unknown-field": ("source", '{},"codecs":[{"name":"pickle"}]'),
    "version-of-the-future": ("format_version", "2"),
    "version-true": ("format_version", "true"),
}
LINES = {
    "path-climbs-out": ('"train/mlp_in/c.0.0.0"', '"../../etc/passwd"'),
    "path-climbs-inside": ('"train/mlp_in/c.0.0.0"', '"train/../../x/c.0.0.0"'),
    "path-absolute": ('"train/mlp_in/c.0.0.0"', '"/etc/passwd"'),
    "path-nul": ('"train/mlp_in/c.0.0.0"', '"train/mlp_in/c.0.0.0\\\\u0000"'),
    "path-of-another-window": ('"train/mlp_in/c.0.0.0"', '"train/mlp_in/c.9.0.0"'),
    "path-twice": ('"train/mlp_in/c.0.1.0"', '"train/mlp_in/c.0.0.0"'),
    "tokens-huge": ('"tokens":64', '"tokens":' + HUGE),
    "tokens-negative": ('"tokens":64', '"tokens":-64'),
    "tokens-none": ('"tokens":64', '"tokens":0'),
    "tokens-beyond-the-window": ('"tokens":64', '"tokens":65'),
    "tokens-twice": ('"tokens":64', '"tokens":64,"tokens":64'),
    "window-huge": ('"window":0', '"window":1099511627776'),
    "window-out-of-place": ('"window":0', '"window":7'),
    "size-negative": ('.0.0":[', '.0.0":[-'),
    "files-nested-deep": ('"files":{', '"files":' + "[" * 3000 + "]" * 3000 + ',"x":{'),
    "split-unknown": ('"split":"train"', '"split":"../train"'),
}


def main(folder: Path) -> None:
    for parser, inputs in hand_picked().items():
        (folder / parser).mkdir(parents=True, exist_ok=True)
        for name, data in inputs.items():
            (folder / parser / name).write_bytes(data)
    sound = {"manifest": ROOT, "journal": JOURNAL, "shard": sound_shard(np.int8)}
    for parser, data in sound.items():
        for number, found in enumerate(find(parser, data)):
            (folder / parser / f"found-{number:02d}").write_bytes(found)


def hand_picked() -> dict[str, dict[str, bytes]]:
    manifest = json.loads(ROOT)["attributes"]["clt"]
    roots = {
        name: '{"zarr_format":3,"node_type":"group","attributes":{"clt":{'
        + ",".join(f'"{k}":{value if k == key else json.dumps(v)}' for k, v in manifest.items())
        + "}}}"
        for name, (key, value) in FIELDS.items()
    }
    roots["nested-deep"] = '{"attributes":' * 3000
    roots["no-object"] = "[]"
    header, first, *_ = JOURNAL.decode().splitlines()
    bodies = {name: first.rpartition(',"crc32c"')[0].replace(*change, 1) for name, change in LINES.items()}
    journals = {
        name: f'{header}\n{body},"crc32c":"{checksum(body.encode())}"}}\n'.encode()
        for name, body in bodies.items()
    }
    journals["window-after-the-end"] = JOURNAL + first.encode() + b"\n"
    journals["line-cut-out"] = JOURNAL[:200] + JOURNAL[250:]
    return {
        "manifest": {name: text.encode() for name, text in roots.items()},
        "journal": journals,
        "shard": bad_shards(),
    }


def sound_shard(dtype: type) -> bytes:
    good = encode_chunk((np.arange(64 * 66) % 7).astype(dtype).reshape(64, 66))
    return b"".join(shard_parts([Frames([len(good)], [good])] * SLOTS, SLOTS))


def bad_shards() -> dict[str, bytes]:
    good = encode_chunk(np.zeros((64, 66), np.int8))
    index = struct.Struct("<8Q")

    def indexed(*words: int, body: bytes = good) -> bytes:
        footer = index.pack(*words)
        return body + footer + bytes.fromhex(checksum(footer))[::-1]

    bomb = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", 1 << 50) + good[13:]
    return {
        "empty": b"",
        "cut-in-the-index": sound_shard(np.int8)[:-7],
        "chunk-behind-the-file": indexed(*[1 << 40, len(good)] * SLOTS),
        "chunk-longer-than-the-file": indexed(*[0, 1 << 62] * SLOTS),
        "offset-and-size-overflow": indexed(*[2**64 - 8, 16] * SLOTS),
        "absent-half": indexed(*[2**64 - 1, len(good)] * SLOTS),
        "all-absent": indexed(*[2**64 - 1] * (2 * SLOTS)),
        "zstd-that-claims-a-petabyte": indexed(*[0, len(bomb)] * SLOTS, body=bomb),
        "chunk-of-another-size": indexed(
            *[0, len(small := encode_chunk(np.zeros(5, np.int8)))] * SLOTS, body=small
        ),
        "no-frame": indexed(*[0, 40] * SLOTS, body=b"\x80\x04cos\nsystem\n" + b"." * 40),
        "blosc-in-zstds-place": sound_shard(np.uint16),
    }


def find(parser: str, sound: bytes) -> list[bytes]:
    """The smallest input for each kind of refusal."""
    kinds: dict[str, bytes] = {}

    @settings(
        max_examples=1500,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(altered(sound))
    def search(data: bytes) -> None:
        with tempfile.TemporaryDirectory() as folder:
            fault = refusal(parser, data, Path(folder) / "c")
        kind = re.sub(r"/\S+|'[^']*'|[0-9a-f]{8}|\d+", "_", fault or "")[:120]
        if fault and (kind not in kinds or len(data) < len(kinds[kind])):
            kinds[kind] = data

    search()
    return [data for _, data in sorted(kinds.items())][:15]


@st.composite
def altered(draw: st.DrawFn, sound: bytes) -> bytes:
    """Some flipped bits, cuts and insertions; a journal's second line may be signed again."""
    data = bytearray(sound)
    signed = sound.startswith(b'{"format"') and draw(st.booleans())
    if signed:
        data = bytearray(sound.splitlines()[1].rpartition(b',"crc32c"')[0])
    for _ in range(draw(st.integers(1, 3))):
        at, kind = draw(st.integers(0, len(data))), draw(st.integers(0, 3))
        if kind == 0 and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            del data[at : at + draw(st.integers(1, 2000))]
        elif kind == 2 and not signed:
            del data[at:]
        else:
            data[at:at] = draw(st.binary(max_size=20))
    if signed:
        body = bytes(data).replace(b"\n", b"")
        sign = f',"crc32c":"{checksum(body)}"}}\n'.encode()
        return sound.splitlines()[0] + b"\n" + body + sign
    return bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
