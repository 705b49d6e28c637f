"""What real data gets wrong: each fault is met with one clear line, and nothing else is lost."""

import errno
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import clt.cache_format.encoders
from clt.cache_format import CacheError, CacheWriter, open_cache, verify_cache
from clt.cache_format.files import FileBeside
from clt.harvest.config import HarvestConfig
from clt.harvest.disk import RESERVE
from clt.harvest.landing import Landing
from clt.harvest.run import harvest


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_llava(tmp_path_factory.mktemp("model"))


def configure(model: Path, dataset: Path, cache: Path, **options: Any) -> HarvestConfig:
    defaults: dict[str, Any] = {"window": 64, "val_fraction": 0.0, "max_bad_fraction": 1.0}
    return HarvestConfig(model=str(model), dataset=str(dataset), cache=cache, **{**defaults, **options})


def say(value: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": value}, {"from": "gpt", "value": "a red circle"}]


BAD_ROWS = {
    "missing image": (
        {"image": "nowhere.png", "conversations": say("<image>\nwhat")},
        "cannot be read: No such file",
    ),
    "broken image": (
        {"image": "broken.png", "conversations": say("<image>\nwhat")},
        "'broken.png' cannot be read",
    ),
    "empty image": (
        {"image": "empty.png", "conversations": say("<image>\nwhat")},
        "'empty.png' cannot be read",
    ),
    "path that climbs out": (
        {"image": "../../secret.png", "conversations": say("<image>\nx")},
        "lies outside",
    ),
    "address": (
        {"image": "https://example.org/a.png", "conversations": say("<image>\nx")},
        "is an address",
    ),
    "more tags than images": (
        {"image": "good.png", "conversations": say("<image> <image> x")},
        "2 times <image>",
    ),
    "image without a tag": ({"image": "good.png", "conversations": say("what is it")}, "0 times <image>"),
    "tag without an image": (
        {"conversations": say("<image>\nwhat")},
        "1 times <image> in the text, but 0 images",
    ),
    "no text": (
        {"conversations": [{"from": "human", "value": " "}, {"from": "gpt", "value": ""}]},
        "no text",
    ),
    "no turns": ({"conversations": []}, "expected a list that is not empty"),
    "unknown speaker": ({"conversations": [{"from": "robot", "value": "x"}]}, "'robot'"),
    "wrong types": (
        {"conversations": [{"from": "human", "value": 3}]},
        'expected {"from": ..., "value": ...} or',
    ),
    "no known column": ({"title": "x"}, "expected a column conversations, messages"),
    "image token in plain text": ({"text": "see <image> there"}, "the model's image token"),
    "image that does not fit": (
        {"image": "good.png", "conversations": say("a red circle " * 20 + "<image>")},
        "beyond ctx-len 64",
    ),
}


def write_pictures(folder: Path) -> None:
    tiny.write_picture(folder / "good.png", np.random.default_rng(0))
    whole = (folder / "good.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.png").write_bytes(b"")


def test_each_bad_sample_is_listed_and_the_good_ones_are_stored(model: Path, tmp_path: Path) -> None:
    """rejected.jsonl names each one and why; the cache holds the good ones and verifies."""
    write_pictures(tmp_path / "data")
    rows = [{"id": name, **row} for name, (row, _) in BAD_ROWS.items()]
    good = [
        tiny.picture_row(0, "good.png"),
        tiny.picture_row(1, "good.png", "a blue square on a green background"),
    ]
    path = tiny.write_rows(tmp_path / "data", [good[0], *rows, good[1]])
    with open(path, "ab") as file:
        file.write(b'{"id": "cut off", "conversa\n\n\xff\xfe not utf-8\n[1, 2]\n')
    report = harvest(configure(model, path, tmp_path / "c", ctx_len=64))
    cache = open_cache(tmp_path / "c")
    assert report.complete
    assert {line["id"] for line in cache.samples().values()} == {"picture-0", "picture-1"}
    reasons = {line["id"]: line["reason"] for line in cache.rejected()}
    for name, (_, reason) in BAD_ROWS.items():
        assert reason in reasons[name], reasons[name]
    unreadable = [reason for name, reason in reasons.items() if name.startswith("row-")]
    assert sum("not JSON in UTF-8" in reason for reason in unreadable) == 2
    assert sum("expected a JSON object, found list" in reason for reason in unreadable) == 1
    assert report.rejected == len(BAD_ROWS) + 3
    assert verify_cache(str(tmp_path / "c"), full=True) == []


@pytest.mark.parametrize("mode", ["CMYK", "P", "I;16", "L", "RGBA", "1"])
def test_every_kind_of_picture_is_read(model: Path, tmp_path: Path, mode: str) -> None:
    """Palette, 16-bit, grey, CMYK, transparent and one-bit pictures become RGB."""
    (tmp_path / "data").mkdir()
    name = "odd.tif" if mode == "CMYK" else "odd.png"
    Image.new(mode, (30, 20)).save(tmp_path / "data" / name)
    path = tiny.write_rows(tmp_path / "data", [tiny.picture_row(0, name)])
    assert harvest(configure(model, path, tmp_path / "c")).rejected == 0
    assert open_cache(tmp_path / "c").samples()[0]["images"][0]["size"] == [30, 20]


def test_fail_names_the_sample(model: Path, tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "data", [{"id": "me", "conversations": say("<image> x")}])
    with pytest.raises(ValueError, match=r"sample 'me' \(row 0\): 1 times <image>"):
        harvest(configure(model, path, tmp_path / "c", on_bad_sample="fail"))


def test_nothing_but_bad_samples_is_an_error(model: Path, tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "data", [{"id": "me", "conversations": say("<image> x")}])
    with pytest.raises(ValueError, match=r"of 1 samples none could be stored; see .*rejected.jsonl"):
        harvest(configure(model, path, tmp_path / "c"))
    assert "1 times <image>" in (tmp_path / "c" / "rejected.jsonl").read_text()


def test_too_many_bad_samples_stop_the_run(model: Path, tmp_path: Path) -> None:
    rows = [{"id": i, "conversations": say("<image> x" if i % 4 == 0 else "x")} for i in range(200)]
    path = tiny.write_rows(tmp_path / "data", rows)
    with pytest.raises(ValueError, match=r"of 1\d\d samples are bad, more than --max-bad-fraction 0.05"):
        harvest(configure(model, path, tmp_path / "c", max_bad_fraction=0.05))
    assert "1 times <image>" in (tmp_path / "c" / "rejected.jsonl").read_text()


def test_a_few_bad_samples_of_a_few_are_too_many_as_well(model: Path, tmp_path: Path) -> None:
    """Judged at the end where there are fewer than a hundred; then it goes on with a larger fraction."""
    rows = [{"id": i, "conversations": say("<image> x" if i % 4 == 0 else "x")} for i in range(20)]
    path = tiny.write_rows(tmp_path / "data", rows)
    with pytest.raises(ValueError, match=r"5 of 20 samples are bad, more than --max-bad-fraction 0.2;"):
        harvest(configure(model, path, tmp_path / "c", max_bad_fraction=0.2))
    assert not open_cache(tmp_path / "c").complete
    for _ in range(2):
        report = harvest(configure(model, path, tmp_path / "c", max_bad_fraction=0.25))
        assert report.complete
        assert report.rejected == 5
    assert len((tmp_path / "c" / "rejected.jsonl").read_text().splitlines()) == 5


def test_another_dataset_does_not_go_on(model: Path, tmp_path: Path) -> None:
    path = tiny.write_rows(tmp_path / "data", [{"conversations": say("x")}] * 3)
    harvest(configure(model, path, tmp_path / "c"))
    with open(path, "a") as file:
        file.write(json.dumps({"conversations": say("y")}) + "\n")
    with pytest.raises(CacheError, match=r"harvested differently.*dataset_fingerprint: "):
        harvest(configure(model, path, tmp_path / "c"))


def test_pictures_for_a_language_model_are_refused(tmp_path: Path) -> None:
    llama = tiny.save_llama(tmp_path / "llama")
    path = tiny.write_rows(tmp_path / "data", [{"conversations": say("x")}])
    with pytest.raises(ValueError, match="has no chat template, so it cannot read conversations"):
        harvest(configure(llama, path, tmp_path / "c"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "nowhere.txt"}, r"dataset 'nowhere.txt': expected a file, a folder or a hub name"),
        ({"model": "./nowhere"}, r"model './nowhere': expected a folder or a hub id, found no such folder"),
        (
            {"mlp": "layers.{}.nothing"},
            r"--mlp 'layers.{}.nothing': the model has no module layers.0.nothing; candidates: .*s.{}.mlp",
        ),
        ({"layers": "0-9"}, r"--layers: expected some of the 3 layers 0 to 2, found '0-9'"),
    ],
)
def test_wrong_arguments_say_what_was_expected(
    model: Path, tmp_path: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tiny.write_rows(tmp_path / "data", [{"conversations": say("x")}])
    settings = {"model": str(model), "dataset": str(path), "cache": tmp_path / "c", **options}
    with pytest.raises(ValueError, match=message):
        harvest(HarvestConfig(**settings))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int4"}, "--precision: expected one of int8, bf16, found 'int4'"),
        ({"val_fraction": 1.5}, "--val-fraction: expected a fraction from 0 to 1, found 1.5"),
        ({"window": 100}, "--window: expected a multiple of 64, found 100"),
        ({"exclude": ("sink",)}, "--exclude: expected one of text, image, bos, template"),
        ({"tokens": 0}, "--tokens: expected at least 1, found 0"),
        ({"rank": 2, "world_size": 2}, "--rank: expected 0 to 1, found 2"),
    ],
)
def test_config_is_checked_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HarvestConfig(model="m", dataset="d", cache=Path("c"), **options)


def test_full_disk_keeps_what_is_committed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC in the middle of a window: the error passes on, what is committed opens, a rerun completes."""
    tiny.write_dataset(tmp_path / "data")
    config = configure(model, tmp_path / "data" / "train.jsonl", tmp_path / "c", batch_tokens=70)
    calls = []

    def failing(path: Path, parts: Iterable[bytes], rank: int) -> FileBeside:
        calls.append(path)
        if len(calls) > 100:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return FileBeside(path, parts, rank)

    monkeypatch.setattr(clt.cache_format.encoders, "FileBeside", failing)
    with pytest.raises(OSError, match="No space left on device"):
        harvest(config)
    monkeypatch.undo()
    assert not open_cache(tmp_path / "c").complete
    assert harvest(config).complete
    assert verify_cache(str(tmp_path / "c"), full=True) == []


def free_space(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("clt.harvest.disk.shutil.disk_usage", lambda path: type("Usage", (), {"free": size}))


def needed_bytes(config: HarvestConfig, monkeypatch: pytest.MonkeyPatch) -> int:
    """What a harvest says that it needs, when nothing is free."""
    free_space(monkeypatch, -1)
    with pytest.raises(ValueError, match=r"found -0.0 MB free") as fault:
        harvest(config)
    tokens, size = map(int, re.findall(r"\((\d+) more tokens of (\d+) bytes\)", str(fault.value))[0])
    needed = int(RESERVE * tokens * size)
    assert f"expected room for up to {needed / 1e6:.1f} MB" in str(fault.value)
    return needed


@pytest.mark.parametrize("options", [{"tokens": 200}, {}, {"tokens": 200, "world_size": 2}], ids=str)
def test_a_disk_too_small_is_refused_before_the_first_token(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """With both figures, for all ranks, of a whole dataset too; the room that was asked for is enough."""
    tiny.write_dataset(tmp_path / "data")
    config = configure(model, tmp_path / "data" / "train.jsonl", tmp_path / "c", val_fraction=0.2, **options)
    needed = needed_bytes(config, monkeypatch)
    assert list((tmp_path / "c").rglob("c.*")) == []
    free_space(monkeypatch, needed - 1)
    with pytest.raises(ValueError, match="expected room"):
        harvest(config)
    free_space(monkeypatch, needed)
    report = harvest(config)
    token_bytes = open_cache(config.cache).manifest.bytes_per_token
    stored = sum(report.tokens.values()) * config.world_size
    assert 0.6 * needed < RESERVE * token_bytes * stored < 1.5 * needed  # few samples, split by chance


def test_a_resumed_harvest_needs_room_for_the_rest_alone(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is committed lies on the disk already, and is not asked for again."""
    tiny.write_dataset(tmp_path / "data")
    config = configure(
        model, tmp_path / "data" / "train.jsonl", tmp_path / "c", batch_tokens=70, val_fraction=0.0
    )
    whole = needed_bytes(config, monkeypatch)
    monkeypatch.undo()
    commit, calls = CacheWriter._commit, []

    def failing(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        commit(*arguments)

    monkeypatch.setattr(CacheWriter, "_commit", failing)
    with pytest.raises(OSError, match="No space left"):
        harvest(config)
    monkeypatch.undo()
    cache = open_cache(config.cache)
    assert len(cache["train"]) == 2 * cache.manifest.window
    saved = RESERVE * cache.manifest.bytes_per_token * len(cache["train"])
    assert needed_bytes(config, monkeypatch) == pytest.approx(whole - saved, abs=2)


def test_byte_order_mark_and_json_list(model: Path, tmp_path: Path) -> None:
    """A BOM in front, and a .json file that is one list, as LLaVA-Instruct ships."""
    folder = tmp_path / "data"
    rows = [{"id": str(i), "conversations": say("what is it")} for i in range(3)]
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + "\n".join(map(json.dumps, rows)).encode())
    (folder / "b.json").write_text(json.dumps(rows))
    for name in ("a.jsonl", "b.json"):
        assert harvest(configure(model, folder / name, tmp_path / name)).rejected == 0
        assert len(open_cache(tmp_path / name).samples()) == 3


@pytest.mark.parametrize("precision", ["int8", "bf16"])
@pytest.mark.parametrize("site", ["mlp_in", "mlp_out"])
def test_numbers_that_are_not_finite_are_named_and_nothing_behind_them_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, site: str
) -> None:
    """Sample, layer and site; the cache goes on, mended, as if nothing had happened."""
    tiny.write_dataset(tmp_path / "data")
    data = tmp_path / "data" / "train.jsonl"
    options = {"precision": precision, "batch_tokens": 70, "ctx_len": 64}
    harvest(configure(model, data, tmp_path / "whole", **options))
    put, bad = Landing.put, open_cache(tmp_path / "whole").samples()

    def poisoned(self: Landing, where: str, index: int, values: torch.Tensor) -> None:
        poisoned.calls += where == "mlp_in" and index == 0
        if poisoned.calls == 4 and (where, index) == (site, 1):
            values = values.clone()
            values[0, 2, 5] = float("nan")
        put(self, where, index, values)

    poisoned.calls = 0
    monkeypatch.setattr(Landing, "put", poisoned)
    config = configure(model, data, tmp_path / "c", **options)
    with pytest.raises(
        ValueError, match=rf"sample '(.*)', layer 1, {site}: .*(not finite|NaN or infinity)"
    ) as fault:
        harvest(config)
    name = re.search("sample '(.*?)'", str(fault.value))[1]
    assert name in {line["id"] for line in bad.values()}
    monkeypatch.undo()
    before = {entry.window for entry in open_cache(config.cache).windows}
    assert harvest(config).complete
    assert before <= {0, 1, 2}
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (config.cache / path.relative_to(tmp_path / "whole")).read_bytes()


def test_odd_rows_are_stored_or_listed(model: Path, tmp_path: Path) -> None:
    """Ids that repeat, texts of one token and of a million, empty turns, blank lines, a BOM, a huge line."""
    (tmp_path / "data").mkdir()
    million = "what is in the picture " * 200_000
    rows = [
        {"id": "same", "text": "a red circle"},
        {"id": "same", "text": "a blue square"},
        {"id": "one", "text": "a"},
        {"id": "million", "text": million},
        {
            "id": "empty turn",
            "conversations": [{"from": "human", "value": ""}, {"from": "gpt", "value": "a"}],
        },
    ]
    lines = [json.dumps(row).encode() for row in rows]
    lines[1:1] = [b"", b"   ", b'{"id": "huge", "text": "' + b"x" * 100_000_000 + b'"}']
    path = tmp_path / "data" / "odd.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    report = harvest(configure(model, path, tmp_path / "c", ctx_len=100))
    cache = open_cache(tmp_path / "c")
    samples = sorted(cache.samples().values(), key=lambda line: line["row"])
    assert [line["id"] for line in samples] == ["same", "same", "one", "million", "empty turn"]
    assert len({line["sample"] for line in samples}) == 5
    tokens = cache["train"].tokens()
    places = list(zip(tokens["sample"].tolist(), tokens["position"].tolist(), strict=True))
    assert len(set(places)) == len(places)
    assert samples[2]["length"] == 2  # with its BOS
    assert samples[3]["length"] == 100
    assert samples[3]["cut"] > 999_000
    assert report.rejected == 1
    assert [(line["id"], line["reason"][:30]) for line in cache.rejected()] == [
        ("row-1", "a row of 100000028 bytes; at m")
    ]
