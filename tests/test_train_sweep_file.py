"""What a sweep's file may say, and what its runs become."""

import re
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.sweep_file import READING, SWEPT, TYPES, read_sweep, sweep_configs

ROOT = Path(__file__).parents[1]
OPTIONS: dict[str, Any] = {"caches": (Path("c"),), "seed": 3, "order_seed": None, "k": None, "lr": 1e-3}


def entries(tmp_path: Path, text: str) -> Any:
    path = tmp_path / "s.toml"
    path.write_text(text)
    return read_sweep(path)


def test_grids_and_runs_are_side_by_side(tmp_path: Path) -> None:
    """Every combination of a grid's lists, then the runs; labels hold what differs."""
    found = entries(
        tmp_path,
        """
        [[grid]]
        k = [16, [8, 8, 4]]
        n-targets = [1, 2]
        tie = "source"
        [[grid]]
        activation = "jumprelu"
        sparsity_coeff = [1, 0.001]
        [[run]]
        name = "skips"
        skip_connection = true
        finetune = "checkpoints/old"
        [[run]]
        """,
    )
    assert [entry.label for entry in found] == [
        "k=16,n_targets=1,tie=source",
        "k=16,n_targets=2,tie=source",
        "k=8-8-4,n_targets=1,tie=source",
        "k=8-8-4,n_targets=2,tie=source",
        "activation=jumprelu,sparsity_coeff=1.0",
        "activation=jumprelu,sparsity_coeff=0.001",
        "skips",
        "plain",
    ]
    assert found[2].settings == {"k": (8, 8, 4), "n_targets": 1, "tie": "source"}
    assert found[6].settings == {"skip_connection": True, "finetune": Path("checkpoints/old")}


def test_seeds_of_the_weights_differ_and_that_of_the_order_is_the_command_lines(tmp_path: Path) -> None:
    found = entries(tmp_path, "[grid]\nseed = [0, 1]\nlr = 1e-4\n")
    first, second = sweep_configs(OPTIONS, found, Path("runs"))
    assert (first.run, second.run) == (Path("runs/seed=0"), Path("runs/seed=1"))
    assert (first.seed, second.seed, first.read_seed, second.read_seed) == (0, 1, 3, 3)
    assert first == replace(second, seed=0, run=first.run)
    assert first.lr == 1e-4
    assert [c.read_seed for c in sweep_configs({**OPTIONS, "order_seed": 9}, found, Path("r"))] == [9, 9]


def test_every_option_is_swept_or_refused_with_a_reason(tmp_path: Path) -> None:
    names = {field.name for kind in (TranscoderConfig, TrainConfig) for field in fields(kind)}
    assert names == TYPES.keys()
    assert set(SWEPT) | set(READING) <= names
    for name in names - set(SWEPT):
        with pytest.raises(ValueError, match=f"grid 1: {name} belongs on the command line, "):
            entries(tmp_path, f"[grid]\n{name} = 1\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[grid]\nk = [", "s.toml: expected TOML, found: "),
        ("", r"expected a table \[grid\] or \[\[run\]\] with settings, found none"),
        ("k = 3", r"expected tables \[grid\] and \[\[run\]\], found k"),
        ("grid = 3", r"expected \[grid\] or \[\[grid\]\] to be a table of settings, found 3"),
        ("[grid]\nk = []", "grid 1: k: expected one value or more, found an empty list"),
        (
            "[grid]\nlatent = [1]",
            "grid 1: latent is no option of clt train; expected some of activation, k, ",
        ),
        (
            "[[run]]\nbatch-tokens = 9",
            "run 1: batch-tokens belongs on the command line, because all runs .* one",
        ),
        ("[grid]\nlr = ['fast']", "grid 1: lr: expected a number, found 'fast'"),
        ("[grid]\nlatents = [1.5]", "grid 1: latents: expected a whole number, found 1.5"),
        ("[grid]\nlatents = [true]", "grid 1: latents: expected a whole number, found True"),
        (
            "[grid]\nk = [[1, 2.5]]",
            r"k: expected a whole number or a list of whole numbers, found \[1, 2.5\]",
        ),
        ("[grid]\nskip_connection = [1]", "skip_connection: expected true or false, found 1"),
        ("[grid]\nk = [4, 4]", "two runs are 'k=4'; leave one out, or give it another name"),
        ("[[run]]\nname = '../up'", "a run's name becomes a folder: .* found '../up'"),
        ("[[run]]\nname = 7\nk = 3\n[[run]]\nname = '7'", "two runs are '7'"),
    ],
)
def test_what_is_wrong_is_said_where(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        entries(tmp_path, text)


def test_the_documented_example_is_a_sweep(tmp_path: Path) -> None:
    text = re.search(r"```toml\n(.*?)```", (ROOT / "docs" / "sweeps.md").read_text(), re.S)[1]
    found = entries(tmp_path, text)
    assert [entry.label for entry in found] == [
        "k=16,seed=0",
        "k=16,seed=1",
        "k=32,seed=0",
        "k=32,seed=1",
        "activation=jumprelu,sparsity_coeff=0.001",
        "activation=jumprelu,sparsity_coeff=0.003",
        "per-layer",
    ]
    assert len(sweep_configs(OPTIONS, found, Path("runs"))) == 7


def test_a_run_that_cannot_be_is_named(tmp_path: Path) -> None:
    found = entries(tmp_path, "[grid]\nactivation = ['topk', 'relu']\n")
    with pytest.raises(
        ValueError, match="run activation=relu of the sweep: --sparsity-coeff: relu needs one"
    ):
        sweep_configs(OPTIONS, found, Path("runs"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"--sweep .*no.toml: expected a TOML file of settings, found no such"
    ):
        read_sweep(tmp_path / "no.toml")
