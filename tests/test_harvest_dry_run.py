"""`clt harvest --dry-run`: what would be stored, told without weights and without writing."""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny

from clt.cache_format import open_cache
from clt.cli import main
from clt.harvest.config import HarvestConfig
from clt.harvest.dry_run import look, render
from clt.harvest.run import harvest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with and one without its weights, and a dataset of which two rows are bad."""
    root = tmp_path_factory.mktemp("dry")
    for name in ("model", "no-weights"):
        tiny.save_llava(root / name)
    for path in (root / "no-weights").glob("*.safetensors"):
        path.unlink()
    path = tiny.write_dataset(root / "data")
    bad = [{"id": "\x1b[2Jbad", "title": "x"}, tiny.picture_row(9, "nowhere.png")]
    with open(path, "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in bad)
    return root


def configure(folder: Path, cache: Path, **options: Any) -> HarvestConfig:
    defaults: dict[str, Any] = {"model": str(folder / "no-weights"), "window": 64, "val_fraction": 0.3}
    return HarvestConfig(
        dataset=str(folder / "data" / "train.jsonl"),
        cache=cache,
        max_bad_fraction=1.0,
        ctx_len=30,
        keep_image_tokens=0.5,
        **{**defaults, **options},
    )


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_it_tells_what_the_harvest_stores(folder: Path, tmp_path: Path, precision: str) -> None:
    """Tokens by split and kind, samples, cuts, rejected samples and bytes are those of the real run."""
    found = look(configure(folder, tmp_path / "dry", layers="0,2"))
    assert not (tmp_path / "dry").exists()
    real = configure(folder, tmp_path / "c", layers="0,2", model=str(folder / "model"), precision=precision)
    report = harvest(real)
    cache = open_cache(real.cache)
    assert found.tokens == {
        split: {kind: n for kind, n in kinds.items() if kind != "sink"}
        for split, kinds in report.kinds.items()
    }
    lines = list(cache.samples().values())
    assert sum(found.samples.values()) == len(lines)
    assert found.cut == sum(line["cut"] > 0 for line in lines) > 0
    told = [(line["id"], line["reason"]) for line in found.rejected]
    assert told == [(line["id"], line["reason"]) for line in cache.rejected()]
    assert len(told) == 2
    assert found.bytes[precision] == sum(report.tokens.values()) * cache.manifest.bytes_per_token


def test_examples_are_the_whole_sample_in_stretches_of_one_kind(folder: Path, tmp_path: Path) -> None:
    """Every token belongs to one stretch; what is not stored is shown as left out."""
    found = look(configure(folder, tmp_path / "dry", exclude=("template",)))
    assert len(found.examples) == 3
    for example in found.examples:
        assert sum(stretch.tokens for stretch in example.stretches) == example.length
        kinds = [stretch.kind for stretch in example.stretches]
        assert all(one != other for one, other in pairwise(kinds))
        assert kinds[0] == "bos"
        assert "left out" in kinds
        assert "template" not in kinds
    some = [stretch for example in found.examples for stretch in example.stretches]
    assert any("what is it" in stretch.text for stretch in some if stretch.kind == "text")
    images = [stretch for stretch in some if stretch.kind == "image"]
    assert {(one.text, one.tokens, one.stored) for one in images} == {("<image>", 9, 4)}


def test_tokens_and_samples_bound_it(folder: Path, tmp_path: Path) -> None:
    few = look(configure(folder, tmp_path / "dry", max_samples=3))
    assert sum(few.samples.values()) + len(few.rejected) == 3
    some = look(configure(folder, tmp_path / "dry", tokens=20, val_fraction=0.0))
    assert 20 <= sum(some.tokens["train"].values()) < 60


def test_colours_and_legend(folder: Path, tmp_path: Path) -> None:
    """Colours are asked for; nothing else that steers a terminal gets through."""
    found = look(configure(folder, tmp_path / "dry"))
    plain, coloured = render(found, False), render(found, True)
    assert "\x1b" not in plain
    assert re.search(r"^  image +'<image> x 4 of 9'$", plain, re.M)
    assert "kinds: " in coloured
    assert set(re.findall(r"\x1b\[[^m]*m", coloured)) <= {
        f"\x1b[{n}m" for n in ("0", "33", "35", "36", "2;9")
    }
    assert "\x1b[36m<image>" in coloured
    assert re.search(r"2 samples rejected\n  row 1[23], id ", plain)


def test_a_harvest_tells_where_its_time_went(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In shares that add up; and nothing of it where there was nothing to do."""
    command = ["clt", "harvest", str(folder / "model"), str(folder / "data" / "train.jsonl")]
    command += [str(tmp_path / "c"), "--max-bad-fraction", "1"]
    for again in (False, True):
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit, match="0"):
            main()
        told = re.search(r"  time: (.*)", capsys.readouterr().out)
        assert (told is None) == again
        if told:
            assert re.sub(r"\d+% ", "", told[1]) == "samples, device, copy, encode, disk"
            assert 97 <= sum(map(int, re.findall(r"(\d+)%", told[1]))) <= 103


def test_the_command_on_a_pipe_and_on_a_terminal(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON alone on a pipe; colours where stdout is a terminal."""
    command = ["clt", "harvest", str(folder / "no-weights"), str(folder / "data" / "train.jsonl")]
    command += [str(tmp_path / "c"), "--dry-run", "--max-samples", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--json"])
    with pytest.raises(SystemExit, match="0"):
        main()
    answer = json.loads(capsys.readouterr().out)
    assert answer.keys() == {"samples", "tokens", "cut", "rejected", "bytes", "examples"}
    assert answer["examples"][0]["stretches"][0] == {"kind": "bos", "tokens": 1, "stored": 1, "text": "<s>"}
    for terminal in (True, False):
        monkeypatch.setattr(sys, "argv", command)
        monkeypatch.setattr(sys.stdout, "isatty", lambda terminal=terminal: terminal)
        with pytest.raises(SystemExit, match="0"):
            main()
        said = capsys.readouterr().out
        assert ("\x1b[35m<s>" in said) == terminal
        assert said.startswith("train: ")
    assert not (tmp_path / "c").exists()
