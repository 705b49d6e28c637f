"""The command line: what it prints, where, and the exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from planted import write_planted

from clt.cache_format import open_cache

COMMANDS = ("harvest", "info", "verify", "train", "eval", "features")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("cli") / "c", 1100, val=100)


def clt(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clt.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    done = clt(command, "--help")
    assert done.returncode == 0
    assert f"Usage: clt {command}" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["frobnicate"], "see `clt --help`"),
        (["train", "x"], "Missing option '--run-name': writes checkpoints/NAME; usage: clt train [OPTIONS]"),
        (["train", "x", "--run-name", "y", "--frob"], "No such option: --frob"),
        (
            ["harvest", "--model", "x"],
            "usage: clt harvest [OPTIONS] {model} {dataset} {cache}, see `clt harv",
        ),
        (
            ["train", "nowhere", "--run-name", "y"],
            "nowhere is no cache: expected a file zarr.json in it, found none",
        ),
        (["info", "nowhere"], "nowhere is no cache"),
        (["verify", "nowhere"], "nowhere is no cache"),
        (["eval", "nowhere"], "nowhere holds no checkpoint: expected a run folder"),
        (["harvest", "./nowhere", "data.jsonl", "c"], "dataset 'data.jsonl': expected a file"),
        (["harvest", "m", "d", "c", "--window", "7"], "--window: expected a multiple of 64, found 7"),
        (["train", "c", "--run-name", "y", "--k", "0"], "--k: expected at least 1, found 0"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = clt(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert list(tmp_path.iterdir()) == [], "a wrong call leaves nothing behind"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = clt("info", "nowhere", "--debug", cwd=tmp_path)
    assert "Traceback" in done.stderr
    assert done.returncode == 2


def test_info_json_has_the_promised_keys(cache: Path) -> None:
    done = clt("info", cache, "--json")
    info = json.loads(done.stdout)
    promised = "format_version model d_model layers precision complete splits bits_per_value noise_fvu"
    assert set(promised.split()) <= info.keys()
    assert set(info["splits"]) == {"train", "val"}
    assert {"tokens", "windows", "bytes", "kinds"} <= info["splits"]["train"].keys()
    assert info["splits"]["train"]["tokens"] == 1100
    assert len(info["noise_fvu"]["mlp_out"]) == 3
    assert info["complete"] is True


def test_info_for_people(cache: Path) -> None:
    done = clt("info", cache)
    assert "1100 tokens (550 text, 550 image; 0 of them sinks) in 3 windows" in done.stdout
    assert "bits a value" in done.stdout


def test_train_and_eval(cache: Path, tmp_path: Path) -> None:
    """The run lies where --run-name says; eval reads it and prints numbers by layer, kind and offset."""
    done = clt("train", cache, "--run-name", "mine", "--k", 4, "--batch-tokens", 256, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoints" / "mine" / "latest").exists()
    score = clt("eval", "checkpoints/mine", "--cache", cache, "--json", cwd=tmp_path)
    found = json.loads(score.stdout)
    assert found["tokens"] == 100
    assert set(found["fvu_kind"]) == {"text", "image"}
    assert set(found["fvu_without_offset"]) == {"0", "1", "2"}
    assert set(found["fvu_layer"]) == {"0", "1", "2"}
    assert "FVU by kind" in clt("eval", "checkpoints/mine", cwd=tmp_path).stdout
    again = clt("train", cache, "--run-name", "mine", cwd=tmp_path)
    assert again.returncode == 2
    assert "choose another --run-name, or go on with --resume" in again.stderr


def test_eval_without_a_val_split_says_what_to_do(tmp_path: Path) -> None:
    cache = write_planted(tmp_path / "c", 200)
    assert (
        clt("train", cache, "--run-name", "x", "--k", 4, "--batch-tokens", 64, cwd=tmp_path).returncode == 0
    )
    done = clt("eval", "checkpoints/x", cwd=tmp_path)
    assert done.returncode == 2
    assert "has no tokens in split val; harvest with a larger --val-fraction" in done.stderr


def test_a_cache_of_another_version_is_refused(tmp_path: Path) -> None:
    cache = write_planted(tmp_path / "c", 200)
    path = cache / "zarr.json"
    path.write_text(path.read_text().replace('"format_version": 1', '"format_version": 2'))
    for command in (["info", cache], ["train", cache, "--run-name", "x"]):
        done = clt(*command, cwd=tmp_path)
        assert done.returncode == 2
        assert "this clt reads cache format 1, the cache has 2" in done.stderr


def test_damage_is_exit_1_and_named(tmp_path: Path) -> None:
    cache = write_planted(tmp_path / "c", 600)
    files = sorted(name for entry in open_cache(cache)["train"].entries for name in entry.files)
    shard = next(name for name in files if name.startswith("train/mlp_in/"))
    data = bytearray((cache / shard).read_bytes())
    data[10] ^= 4
    (cache / shard).write_bytes(data)
    assert clt("verify", cache).returncode == 0
    full = clt("verify", cache, "--full")
    assert full.returncode == 1
    assert shard in full.stdout
    assert json.loads(clt("verify", cache, "--full", "--json").stdout)["faults"]
    used = clt("train", cache, "--run-name", "x", cwd=tmp_path)
    assert used.returncode == 1
    assert shard in used.stderr
    (cache / shard).unlink()
    assert f"{shard} is missing" in clt("verify", cache).stdout
    opened = clt("info", cache)
    assert opened.returncode == 1
    assert f"{shard} is missing" in opened.stderr
