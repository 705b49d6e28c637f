"""metrics.jsonl: its names, what a line is about, and the curves that are made from it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import LAYERS, write_planted
from test_train_loop import configure, lines

from clt.train.config import TrainConfig
from clt.train.curves import Curve, Curves
from clt.train.loop import train
from clt.train.metrics import MetricsFile
from clt.train.report import evaluate_cache

BY_LAYER = ("fvu", "l0", "dead")
SINGLE = {"step", "tokens", "fvu", "loss", "lr", "k", "tokens_per_s", "stall", "shuffle_m", "grad_norm"}
MEANS = ("loss", "fvu", "grad_norm", "shuffle_m", *(f"{n}/{i}" for n in ("fvu", "l0") for i in range(LAYERS)))


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 2000, val=200)


def test_the_metrics_file_has_exactly_these_names(cache: Path, tmp_path: Path) -> None:
    config = configure(cache, tmp_path / "run", steps=3)
    report = train(config)
    found = lines(config.run)
    names = {f"{name}/{layer}" for name in BY_LAYER for layer in range(LAYERS)}
    names |= {"fvu_kind/text", "fvu_kind/image"} | SINGLE
    assert [set(line) for line in found] == [names] * 3
    assert [line["tokens"] for line in found] == [100, 200, 300]
    assert found[0]["loss"] == pytest.approx(sum(found[0][f"fvu/{layer}"] for layer in range(LAYERS)))
    assert report.steps == 3
    assert found[-1]["fvu"] == pytest.approx(report.fvu)
    assert 0 <= found[-1]["stall"] <= 1


DOCUMENT = Path(__file__).parents[1] / "docs" / "metrics.md"


def documented() -> dict[str, list[str]]:
    """By name: unit, averaging and tokens, as docs/metrics.md has them."""
    rows = [line.strip("|").split(" | ") for line in section(0).splitlines() if line.startswith("| `")]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


def section(number: int) -> str:
    """0: metrics.jsonl; 1: eval.json."""
    return DOCUMENT.read_text().split("\n# eval.json\n")[number]


def generic(name: str) -> str:
    """fvu/17 as fvu/<layer>."""
    family, _, member = name.partition("/")
    return f"{family}/<{'layer' if member.isdigit() else 'kind'}>" if member else family


@pytest.fixture(scope="module")
def run_with_all(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Two epochs of a run that gives every loss a weight, jumprelu for the sparsity loss aside."""
    config = configure(
        cache,
        tmp_path_factory.mktemp("all") / "run",
        epochs=2,
        auxk_alpha=0.1,
        dead_latent_penalty=0.1,
    )
    train(config)
    return config


def test_the_document_and_the_code_name_the_same_metrics(
    cache: Path, run_with_all: TrainConfig, tmp_path: Path
) -> None:
    """All names of a top-k run with both losses for dead latents, and of a jumprelu run."""
    sparse = configure(
        cache, tmp_path / "r", steps=1, structure={"k": None, "activation": "jumprelu"}, sparsity_coeff=0.1
    )
    train(sparse)
    names = {generic(name) for run in (run_with_all, sparse) for line in lines(run.run) for name in line}
    assert names == documented().keys()
    assert all(len(cells) == 4 and all(cells) for cells in documented().values())


def test_the_document_and_eval_name_the_same_numbers(run_with_all: TrainConfig) -> None:
    """`model` is there with --model only; what else eval.json holds says what was looked at."""
    found, _ = evaluate_cache(run_with_all.run, "val", (), None)
    first = [line.split(" | ")[0] for line in section(1).splitlines() if line.startswith("| `")]
    names = {name for cell in first for name in re.findall(r"`(\w+)`", cell)}
    assert names - {"model"} == found.keys() - {"split", "tokens"}


def test_the_page_draws_what_the_document_names(
    run_with_all: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every metric but the two that count, and none by another name."""
    asked, get = set(), Curves.__getitem__

    def noting(curves: Curves, name: str) -> Curve:
        asked.add(generic(name))
        return get(curves, name)

    monkeypatch.setattr(Curves, "__getitem__", noting)
    train(run_with_all, resume=True)
    assert asked == documented().keys() - {"step", "tokens", "sparsity"}


def test_a_line_is_the_average_of_the_steps_since_the_last_one(cache: Path, tmp_path: Path) -> None:
    """Seven steps, a line every three and at the end: averages over tokens, the rest as of the last step."""
    every = configure(cache, tmp_path / "every", tokens=650, dtype="float64")  # the seventh has 50 tokens
    third = configure(cache, tmp_path / "third", tokens=650, dtype="float64", log_every=3)
    train(every)
    train(third)
    each, found = lines(every.run), lines(third.run)
    assert [line["step"] for line in found] == [3, 6, 7]
    for line, part in zip(found, (each[:3], each[3:6], each[6:]), strict=True):
        for name in MEANS:  # all steps of one line have the same number of tokens
            assert line[name] == pytest.approx(np.mean([step[name] for step in part])), name
        for name in ("lr", "k", "tokens", *(f"dead/{i}" for i in range(LAYERS))):
            assert line[name] == part[-1][name]


def test_tokens_weigh_the_average(cache: Path, tmp_path: Path) -> None:
    """A short last step counts by its tokens; a kind by the tokens of that kind."""
    every = configure(cache, tmp_path / "every", tokens=240, dtype="float64")
    once = configure(cache, tmp_path / "once", tokens=240, dtype="float64", log_every=3)
    train(every)
    train(once)
    each, (found,) = lines(every.run), lines(once.run)
    for name in ("loss", "fvu", "l0/1"):
        assert found[name] == pytest.approx(np.average([s[name] for s in each], weights=[100, 100, 40]))
    kinds = {k: found[f"fvu_kind/{k}"] for k in ("text", "image")}
    for kind, value in kinds.items():
        steps = [step[f"fvu_kind/{kind}"] for step in each]
        assert min(steps) < value < max(steps)


def test_lines_end_at_checkpoints(cache: Path, tmp_path: Path) -> None:
    """A run cut off between two checkpoints and resumed writes the lines of one that was not."""
    timing = ("tokens_per_s", "stall")
    options: dict[str, Any] = {"steps": 11, "save_every": 4, "log_every": 3}
    whole = configure(cache, tmp_path / "whole", **options)
    train(whole)
    expected = [{k: v for k, v in line.items() if k not in timing} for line in lines(whole.run)]
    assert [line["step"] for line in expected] == [3, 4, 6, 8, 9, 11]
    cut = configure(cache, tmp_path / "cut", **options)
    stop_after(6, cut)
    assert [line["step"] for line in lines(cut.run)] == [3, 4, 6]
    train(cut, resume=True)
    assert [{k: v for k, v in line.items() if k not in timing} for line in lines(cut.run)] == expected


def stop_after(step: int, config: Any) -> None:
    """Train, and fail (as a kill would) once `step` steps are done."""
    import clt.train.loop as loop

    one = loop.Loop.take_step

    def failing(self: Any) -> None:
        if self.step == step:
            raise KeyboardInterrupt
        one(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Loop, "take_step", failing)
        with pytest.raises(KeyboardInterrupt):
            train(config)


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    """Any JSON reader can read the file; NaN and Infinity are no JSON."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path, 0)
    file.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "fvu": 0.5})
    file.close()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    line = json.loads(path.read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": None, "grad_norm": None, "fvu": 0.5}
    assert len(file.curves["loss"].step) == 0
    assert file.curves["fvu"].mean.tolist() == [0.5]


def test_lines_after_the_checkpoint_and_a_cut_line_go(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "fvu": 1.0}\n{"step": 2, "fvu": 0.5}\n{"step": 3, "fvu": 0.2}\n{"step": 4, "f'
    )
    file = MetricsFile(path, 2)
    file.write({"step": 3, "fvu": 0.4})
    file.close()
    assert [json.loads(line)["fvu"] for line in path.read_text().splitlines()] == [1.0, 0.5, 0.4]
    assert file.curves["fvu"].mean.tolist() == [1.0, 0.5, 0.4]


@pytest.mark.parametrize("n", [1, 7, 8, 9, 16, 17, 100, 1000])
def test_curves_are_means_of_consecutive_lines(n: int) -> None:
    """Against numpy: equal strides, a shorter last one, lowest and highest, missing values left out."""
    rng = np.random.default_rng(n)
    values = rng.standard_normal(n)
    values[rng.random(n) < 0.2] = np.nan
    curves = Curves(max_points=8)
    for step, value in enumerate(values, 1):
        line = {"step": step, "tokens": 10 * step, "a": None if np.isnan(value) else value}
        curves.add({**line, "late": 1.0} if step > 5 else line)
    assert curves.stride * 8 >= n > curves.stride * 4 or curves.stride == 1
    parts = [values[i : i + curves.stride] for i in range(0, n, curves.stride)]
    kept = [part[~np.isnan(part)] for part in parts if not np.isnan(part).all()]
    found = curves["a"]
    for mine, law in ((found.mean, np.mean), (found.low, np.min), (found.high, np.max)):
        np.testing.assert_allclose(mine, [law(part) for part in kept])
    ends = [min(n, i + curves.stride) for i in range(0, n, curves.stride)]
    assert curves["tokens"].step.tolist() == ends
    assert len(curves["late"].step) == sum(end > 5 for end in ends)
    assert len(curves["never"].step) == 0
