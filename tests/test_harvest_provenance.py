"""From any token of a cache back to its text, its picture and the patch's place in it."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from PIL import Image
from transformers import AutoProcessor, CLIPImageProcessorPil, LlavaImageProcessorPil

from clt.cache_format import CacheError, open_cache
from clt.cache_format.provenance import patch_rectangle, trace_token
from clt.harvest.config import HarvestConfig
from clt.harvest.crop import seen_box
from clt.harvest.provenance import read_source
from clt.harvest.run import harvest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache in `c`; half its samples have two pictures of 40 x 24, seen whole."""
    root = tmp_path_factory.mktemp("provenance")
    tiny.save_llava(root / "model")
    tiny.write_dataset(root / "data")
    rows = [json.loads(line) for line in (root / "data" / "train.jsonl").read_text().splitlines()]
    rng = np.random.default_rng(1)
    for number in range(4):
        names = [f"images/wide-{number}-{side}.png" for side in "lr"]
        for name in names:
            Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).save(root / "data" / name)
        talk = [
            {"from": "human", "value": "<image>\nor\n<image>\nwhat is it"},
            {"from": "gpt", "value": "a red square"},
        ]
        rows.append({"id": f"pair-{number}", "image": names, "conversations": talk})
    tiny.write_rows(root / "data", rows)
    harvest(
        HarvestConfig(
            model=str(root / "model"),
            dataset=str(root / "data" / "train.jsonl"),
            cache=root / "c",
            window=64,
            val_fraction=0.2,
            keep_image_tokens=0.5,
        )
    )
    return root


def test_every_token_leads_back_to_its_source(folder: Path) -> None:
    """Id, row, text, file, hash, patch, position and string, each read from the dataset in another way."""
    cache = open_cache(folder / "c")
    rows = [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]
    processor = AutoProcessor.from_pretrained(folder / "model")
    n_images = 0
    for split in ("train", "val"):
        for number in range(len(cache[split])):
            trace = trace_token(cache, split, number)
            found = read_source(trace, cache.manifest.source)
            row = rows[trace["dataset_row"]]
            assert row["id"] == trace["id"]
            assert found.notes == []
            for turn in row["conversations"]:
                assert turn["value"].replace("<image>\n", "").split("\n")[-1] in found.text
            ids = expected_ids(processor, row, folder / "data")
            assert ids[trace["position"]] == trace["token_id"]
            assert processor.tokenizer.decode([trace["token_id"]]) in (
                found.token_string,
                "\N{REPLACEMENT CHARACTER}",
            )
            if trace["kind"] != "image":
                assert trace["image"] is None
                continue
            n_images += 1
            check_patch(trace["image"], found.image_path, row, ids, trace["position"], folder / "data")
    assert n_images > 40


def expected_ids(processor: Any, row: dict[str, Any], data: Path) -> list[int]:
    names = row.get("image", [])
    pictures = [read(data / name) for name in ([names] if isinstance(names, str) else names)]
    text = "".join(
        f"<|{'user' if turn['from'] == 'human' else 'assistant'}|>{turn['value']}<|end|>"
        for turn in row["conversations"]
    ).replace("<image>\nor\n<image>", "<image>\nor<image>")
    ids: list[int] = processor(text=text, images=pictures or None, return_tensors="pt")["input_ids"][
        0
    ].tolist()
    return ids


def read(path: Path) -> Image.Image:
    with Image.open(path) as file:
        return file.copy()


def check_patch(
    image: dict[str, Any], path: str, row: dict[str, Any], ids: list[int], position: int, data: Path
) -> None:
    """The nth image token is patch n of nine of its picture, whose 3x3 grid covers all of it."""
    names = [row["image"]] if isinstance(row["image"], str) else row["image"]
    nth = sum(one == ids[position] for one in ids[:position])
    name = names[nth // 9]
    assert image["file"] == name
    assert Path(path) == data / name
    assert image["sha256"] == hashlib.sha256((data / name).read_bytes()).hexdigest()
    assert (image["row"], image["col"]) == divmod(nth % 9, 3)
    width, height = read(data / name).size
    down, across = divmod(nth % 9, 3)
    wanted = [across * width / 3, down * height / 3, (across + 1) * width / 3, (down + 1) * height / 3]
    assert image["rectangle"] == pytest.approx(wanted, abs=0.01)


PROCESSORS = {
    "whole, squeezed": CLIPImageProcessorPil(
        size={"height": 48, "width": 48}, do_center_crop=False, do_convert_rgb=False
    ),
    "shortest edge, then the centre": CLIPImageProcessorPil(
        size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    ),
    "a smaller centre": CLIPImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 48, "width": 48}
    ),
    "padded to a square": LlavaImageProcessorPil(
        do_pad=True, size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}
    ),
}


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(120, 120), (200, 100), (96, 300), (301, 227)])
def test_the_rectangle_is_what_the_patch_saw(name: str, size: tuple[int, int]) -> None:
    """A picture whose red is its column and whose green is its row tells where each patch's middle lies."""
    processor, (width, height) = PROCESSORS[name], size
    column, line = np.meshgrid(np.arange(width), np.arange(height))
    colours = np.stack([column, line, np.full_like(line, 255)], axis=-1)
    floats = processor(
        (colours * 0.5).astype(np.uint8), do_normalize=False, do_rescale=False, return_tensors="np"
    )["pixel_values"][0]
    box = seen_box(processor, size)
    described = {"crop": list(box), "grid": [4, 4], "size": list(size)}
    for row in range(4):
        for col in range(4):
            patch = floats[:, row * 12 : row * 12 + 12, col * 12 : col * 12 + 12]
            if patch[2].min() < 127 - 2:
                continue  # partly padding
            left, top, right, bottom = patch_rectangle(described, 0, row, col)
            tolerance = 2 + max(size) / 48  # rounding to half units, and one pixel of the resized picture
            assert 2 * patch[0].mean() == pytest.approx((left + right) / 2, abs=tolerance)
            assert 2 * patch[1].mean() == pytest.approx((top + bottom) / 2, abs=tolerance)
            assert right - left == pytest.approx(2 * (patch[0].max() - patch[0].min()), abs=2 * tolerance)


def test_what_is_gone_or_changed_is_a_note(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "moved")
    cache = open_cache(folder / "c")
    kinds = cache["train"].token_column("kind")
    trace = trace_token(cache, "train", int(np.flatnonzero(kinds == 1)[0]))
    gone = {**cache.manifest.source, "dataset": str(tmp_path / "nowhere.jsonl"), "model": "no/model"}
    found = read_source(trace, gone)
    assert found.text is None
    assert "is not on this machine; --dataset says where" in found.notes[1]
    assert "no tokenizer.json of no/model" in found.notes[0]
    moved = tmp_path / "moved" / "data"
    (moved / trace["image"]["file"]).write_bytes(b"other")
    found = read_source(trace, gone, str(moved / "train.jsonl"))
    assert found.text is not None
    assert found.image_unchanged is False
    (moved / trace["image"]["file"]).unlink()
    assert "No such file" in read_source(trace, gone, str(moved / "train.jsonl")).notes[-1]
    with open(moved / "train.jsonl", "a") as file:
        file.write("{}\n")
    assert "is not the one of the harvest" in read_source(trace, gone, str(moved / "train.jsonl")).notes[-1]


def test_a_token_beyond_the_end_is_named(folder: Path) -> None:
    cache = open_cache(folder / "c")
    with pytest.raises(
        CacheError, match=rf"split train has tokens 0 to {len(cache['train']) - 1}, found 10000"
    ):
        trace_token(cache, "train", 10_000)


def test_info_prints_it_without_heavy_imports(folder: Path) -> None:
    """As text and as JSON, where torch, transformers and datasets cannot be imported."""
    block = "".join(
        f"sys.modules[{name!r}] = None; " for name in ("torch", "transformers", "datasets", "PIL")
    )
    cache = open_cache(folder / "c")
    number = int(np.flatnonzero(cache["train"].token_column("kind") == 1)[0])
    for more in ([], ["--json"]):
        arguments = ["clt", "info", str(folder / "c"), "--token", str(number), *more]
        code = f"import sys; {block}sys.argv = {arguments!r}; from clt.cli import main; main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        trace = trace_token(cache, "train", number)
        assert trace["image"]["sha256"] in done.stdout
        if more:
            answer = json.loads(done.stdout)
            assert {name: answer[name] for name in trace} == trace
            assert answer["source"]["token_string"] == "<image>"
        else:
            for part in (
                "user: <image>",
                "'<image>'",
                f"position   {trace['position']} of",
                "of the upright picture",
            ):
                assert part in done.stdout
