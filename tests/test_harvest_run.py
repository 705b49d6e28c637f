"""The cache against plain forward passes with hooks, and what resuming and bad input do."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from clt.cache_format import CacheError, open_cache, verify_cache
from clt.cache_format.encoders import Encoders
from clt.harvest.config import HarvestConfig
from clt.harvest.run import harvest
from clt.harvest.taps import MlpTaps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny LLaVA in `model`, a dataset in `data`."""
    root = tmp_path_factory.mktemp("harvest")
    tiny.save_llava(root / "model")
    tiny.write_dataset(root / "data")
    return root


def configure(folder: Path, cache: Path, **options: Any) -> HarvestConfig:
    defaults: dict[str, Any] = {
        "dataset": str(folder / "data" / "train.jsonl"),
        "window": 64,
        "val_fraction": 0.3,
    }
    return HarvestConfig(model=str(folder / "model"), cache=cache, **{**defaults, **options})


def stored(cache: Path, split: str, site: str) -> dict[tuple[str, int], np.ndarray]:
    """(sample id, position) -> (layer, d_model)"""
    opened = open_cache(cache)
    names = {number: line["id"] for number, line in opened.samples().items()}
    tokens, values = opened[split].tokens(), opened[split].read(site)
    keys = [(names[int(s)], int(p)) for s, p in zip(tokens["sample"], tokens["position"], strict=True)]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, values, strict=True))


def plain_forward(
    folder: Path, row: dict[str, Any], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """(layer, token, d_model) in and out of every MLP for one sample alone, by hooks on the whole model."""
    model = AutoModelForImageTextToText.from_pretrained(folder / "model", dtype=dtype)
    processor = AutoProcessor.from_pretrained(folder / "model")
    roles = {"human": "user", "gpt": "assistant"}
    messages = []
    for turn in row["conversations"]:
        text = turn["value"].replace("<image>\n", "")
        parts = ([{"type": "image"}] if "<image>" in turn["value"] else []) + [{"type": "text", "text": text}]
        messages.append({"role": roles[turn["from"]], "content": parts})
    prompt = processor.apply_chat_template(messages)
    from PIL import Image

    pictures = [Image.open(folder / "data" / row["image"])] if "image" in row else None
    inputs = processor(text=prompt, images=pictures, return_tensors="pt")
    if pictures:
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    seen: dict[str, list[torch.Tensor]] = {"in": [], "out": []}
    for layer in model.model.language_model.layers:
        layer.mlp.register_forward_hook(
            lambda module, given, out: seen["in"].append(given[0][0]) or seen["out"].append(out[0])
        )
    with torch.no_grad():
        model(**inputs)
    return torch.stack(seen["in"]), torch.stack(seen["out"]), inputs["input_ids"][0]


def read_rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "data" / "train.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_sample_at_a_time_is_a_plain_forward_bit_for_bit(
    folder: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    """With one sample a batch, bf16 storage gives back the hooks' values bit for bit."""
    name = str(dtype).removeprefix("torch.")
    harvest(configure(folder, tmp_path / "c", precision="bf16", batch_tokens=1, dtype=name))
    found = {site: stored(tmp_path / "c", "train", site) for site in ("mlp_in", "mlp_out")}
    held = {site: stored(tmp_path / "c", "val", site) for site in ("mlp_in", "mlp_out")}
    for site in found:
        found[site] |= held[site]
    n_tokens = 0
    for row in read_rows(folder):
        before, after, ids = plain_forward(folder, row, dtype)
        for site, truth in (("mlp_in", before), ("mlp_out", after)):
            wanted = truth.to(torch.bfloat16).float().numpy()
            got = np.stack([found[site][row["id"], place] for place in range(len(ids))], axis=1)
            assert np.array_equal(got, wanted), (row["id"], site)
        n_tokens += len(ids)
    assert n_tokens == len(found["mlp_in"])


@pytest.mark.parametrize("site", ["mlp_in", "mlp_out"])
def test_mixed_batch_is_each_sample_alone_within_the_step(folder: Path, tmp_path: Path, site: str) -> None:
    """Batches of mixed lengths: int8 values lie within half a step of each sample's own forward pass."""
    harvest(configure(folder, tmp_path / "c", val_fraction=0.0, batch_tokens=300))
    found = stored(tmp_path / "c", "train", site)
    for row in read_rows(folder):
        before, after, ids = plain_forward(folder, row, torch.float32)
        truth = (before if site == "mlp_in" else after).numpy()
        got = np.stack([found[row["id"], place] for place in range(len(ids))], axis=1)
        for start in range(0, truth.shape[2], 64):
            block = slice(start, start + 64)
            typical = np.sqrt(np.pi / 2) * np.abs(truth).mean(axis=2, keepdims=True)
            step = np.maximum(typical / 8, np.abs(truth[..., block]).max(axis=2, keepdims=True) / 127)
            assert (np.abs(got[..., block] - truth[..., block]) <= 0.502 * step + 1e-5).all()


def test_mixed_batch_equals_single_samples_to_rounding(folder: Path, tmp_path: Path) -> None:
    """No leak from padding or positions: 1e-5 of the largest value, in float32 before storage."""
    harvest(configure(folder, tmp_path / "one", val_fraction=0.0, precision="bf16", batch_tokens=1))
    harvest(configure(folder, tmp_path / "many", val_fraction=0.0, precision="bf16", batch_tokens=300))
    one, many = (stored(tmp_path / name, "train", "mlp_out") for name in ("one", "many"))
    assert one.keys() == many.keys()
    for key, value in one.items():
        # float32 differs in its last bits; rounding to bf16 (2**-8) may then fall either way
        np.testing.assert_allclose(many[key], value, rtol=2**-7, atol=1e-5)


def test_token_table_tells_image_from_text(folder: Path, tmp_path: Path) -> None:
    """Nine image tokens a picture, in rows and columns of its 3x3 grid; BOS, template and text apart."""
    harvest(configure(folder, tmp_path / "c", val_fraction=0.0))
    cache = open_cache(tmp_path / "c")
    tokens, samples = cache["train"].tokens(), cache.samples()
    processor = AutoProcessor.from_pretrained(folder / "model")
    for number, line in samples.items():
        mine = {name: column[tokens["sample"] == number] for name, column in tokens.items()}
        order = np.argsort(mine["position"])
        mine = {name: column[order] for name, column in mine.items()}
        image = mine["kind"] == 1
        assert image.sum() == 9 * len(line["images"])
        if image.any():
            assert mine["row"][image].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
            assert mine["col"][image].tolist() == [0, 1, 2] * 3
        assert (mine["row"][~image] == -1).all()
        assert mine["kind"][0] == 2  # <s>
        text = processor.decode(mine["token_id"][mine["kind"] == 0])
        row = next(row for row in read_rows(folder) if row["id"] == line["id"])
        said = "".join(turn["value"].replace("<image>\n", "") for turn in row["conversations"])
        assert text == said
        template = processor.decode(mine["token_id"][mine["kind"] == 3])
        assert set(template.replace("\n", "").split("<|")) <= {"", "user|>", "assistant|>", "end|>"}


def test_resid_mid_goes_through_the_norm_to_mlp_in(folder: Path, tmp_path: Path) -> None:
    """norm(resid_mid) is what the MLP read."""
    options = {"val_fraction": 0.0, "precision": "bf16", "batch_tokens": 1}
    harvest(configure(folder, tmp_path / "resid", input_site="resid_mid", **options))
    harvest(configure(folder, tmp_path / "in", **options))
    resid, read = (stored(tmp_path / name, "train", "mlp_in") for name in ("resid", "in"))
    model = AutoModelForImageTextToText.from_pretrained(folder / "model")
    for key, values in list(resid.items())[:20]:
        for layer, block in enumerate(model.model.language_model.layers):
            normed = block.post_attention_layernorm(torch.from_numpy(values[layer])).detach().numpy()
            np.testing.assert_allclose(normed, read[key][layer], rtol=0.02, atol=0.02)


def test_layers_and_exclude_choose_what_is_stored(folder: Path, tmp_path: Path) -> None:
    options = {"val_fraction": 0.0, "precision": "bf16", "batch_tokens": 1}
    harvest(configure(folder, tmp_path / "all", **options))
    harvest(configure(folder, tmp_path / "some", layers="0,2", exclude=("template", "bos"), **options))
    everything, some = (stored(tmp_path / name, "train", "mlp_out") for name in ("all", "some"))
    assert open_cache(tmp_path / "some").manifest.layers == (0, 2)
    assert set(np.unique(open_cache(tmp_path / "some")["train"].tokens()["kind"])) == {0, 1}
    for key, value in some.items():
        assert np.array_equal(value, everything[key][[0, 2]])


def test_keep_image_tokens_draws_a_fraction_of_each_picture(folder: Path, tmp_path: Path) -> None:
    harvest(configure(folder, tmp_path / "c", val_fraction=0.0, keep_image_tokens=1 / 3))
    tokens = open_cache(tmp_path / "c")["train"].tokens()
    _, counts = np.unique(tokens["sample"][tokens["kind"] == 1], return_counts=True)
    assert counts.tolist() == [3] * 6
    places = {
        tuple(sorted(tokens["position"][(tokens["sample"] == s) & (tokens["kind"] == 1)]))
        for s in np.unique(tokens["sample"][tokens["kind"] == 1])
    }
    assert len(places) > 1


def test_tokens_stops_exactly(folder: Path, tmp_path: Path) -> None:
    report = harvest(configure(folder, tmp_path / "c", tokens=100))
    assert report.tokens["train"] == 100
    assert len(open_cache(tmp_path / "c")["train"]) == 100
    assert open_cache(tmp_path / "c").complete


def test_on_a_processor_the_model_waits_for_encoding_and_not_for_the_disk(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No forward pass begins while a window is encoded; windows are synced while later passes go on."""
    run, write, place = MlpTaps.run, Encoders.write, Encoders.place
    encoding, began_after_encoding, encoded = [], threading.Event(), 0

    def watched_run(*arguments: Any) -> None:
        assert not encoding
        if encoded:
            began_after_encoding.set()
        run(*arguments)

    def watched_write(*arguments: Any) -> Any:
        nonlocal encoded
        encoding.append(True)
        time.sleep(0.02)
        written = write(*arguments)
        encoded += 1
        encoding.pop()
        return written

    def watched_place(*arguments: Any) -> Any:
        assert began_after_encoding.wait(60), "the model waits for the disk"
        return place(*arguments)

    monkeypatch.setattr(MlpTaps, "run", watched_run)
    monkeypatch.setattr(Encoders, "write", watched_write)
    monkeypatch.setattr(Encoders, "place", watched_place)
    assert harvest(configure(folder, tmp_path / "cache", batch_tokens=64)).complete
    assert encoded > 2


def test_split_is_by_sample(folder: Path, tmp_path: Path) -> None:
    harvest(configure(folder, tmp_path / "c"))
    cache = open_cache(tmp_path / "c")
    train, val = ({int(s) for s in cache[split].tokens()["sample"]} for split in ("train", "val"))
    assert train
    assert val
    assert not train & val


def test_harvesting_again_does_nothing_and_other_arguments_are_refused(folder: Path, tmp_path: Path) -> None:
    first = harvest(configure(folder, tmp_path / "c"))
    before = {p: p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file()}
    again = harvest(configure(folder, tmp_path / "c"))
    assert again == first._replace(seconds=again.seconds)
    assert before == {p: p.read_bytes() for p in (tmp_path / "c").rglob("*") if p.is_file()}
    with pytest.raises(CacheError, match=r"harvested differently.*ctx_len: 1024 -> 99"):
        harvest(configure(folder, tmp_path / "c", ctx_len=99))


SLOW_HARVEST = """
import sys, time
import clt.harvest.run as run
from clt.cli import main
take = run.MlpTaps.run
def slow(self, *args):
    time.sleep(0.05)
    return take(self, *args)
run.MlpTaps.run = slow
root, cache = sys.argv[1:]
sys.argv = ["clt", "harvest", root + "/model", root + "/data/train.jsonl", cache]
sys.argv += "--window 64 --val-fraction 0.3 --batch-tokens 70".split()
main()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_and_resumed_equals_uninterrupted(
    folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Every file, byte for byte, after a stop between windows and a second run; asked to stop, it stops at a
    window's end, with nothing half written, one line and 130."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = {"batch_tokens": 70}
    harvest(configure(folder, whole, **options))
    command = [sys.executable, "-c", SLOW_HARVEST, str(folder), str(cut)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal = cut / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") >= 2):
        time.sleep(0.01)
    os.kill(process.pid, number)
    _, said = process.communicate()
    assert not open_cache(cut).complete, "the test was too slow to interrupt"
    windows = open_cache(cut).windows
    assert windows
    assert {entry.tokens for entry in windows} == {64}
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert said.splitlines()[-1].startswith("error: interrupted; what was saved is kept")
        assert "Traceback" not in said
        listed = {cut / name for entry in windows for name in entry.files}
        assert listed == set(cut.rglob("c.*")), "files of a window that is not committed"
        assert not list(cut.rglob(".*"))
    harvest(configure(folder, cut, **options))
    files = {p.relative_to(whole): p.read_bytes() for p in whole.rglob("*") if p.is_file()}
    again = {
        p.relative_to(cut): p.read_bytes() for p in cut.rglob("*") if p.is_file() and ".partial" not in p.name
    }
    assert files == again
    assert verify_cache(str(cut), full=True) == []


def test_plain_text_with_a_language_model(tmp_path: Path) -> None:
    """BOS from the tokenizer, the rest text; what is longer than ctx-len is cut, and the cut recorded."""
    model = tiny.save_llama(tmp_path / "llama")
    texts = ["a red circle", "a blue background is in the picture " * 30]
    data = tiny.write_rows(tmp_path / "data", [{"text": text} for text in texts])
    harvest(
        HarvestConfig(
            model=str(model), dataset=str(data), cache=tmp_path / "c", window=64, val_fraction=0.0, ctx_len=50
        )
    )
    cache = open_cache(tmp_path / "c")
    lines = {line["id"]: line for line in cache.samples().values()}
    assert lines["row-1"]["length"] == 50
    assert lines["row-1"]["cut"] > 0
    assert lines["row-0"]["cut"] == 0
    assert cache["train"].counts() == {"text": len(cache["train"]) - 2, "image": 0, "bos": 2, "template": 0}


@pytest.mark.parametrize("compiled", [False, True])
def test_a_harvest_says_once_that_the_codec_is_not_compiled(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    compiled: bool,
) -> None:
    """One line, with the way out; and none where it is."""
    monkeypatch.setattr("clt.harvest.run.COMPILED", compiled)
    harvest(configure(folder, tmp_path / "c", max_samples=2))
    told = [line for line in capsys.readouterr().err.splitlines() if "install a C compiler" in line]
    assert len(told) == (not compiled)
