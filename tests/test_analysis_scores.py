"""Measures and intervals against sums written out, and `clt eval --model` from end to end."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from clt.analysis.logit_changes import LogitChanges
from clt.analysis.scores import MEASURES, Scores, compare

MODEL = ("--model", "model", "--dataset", "train.jsonl")


def test_measures() -> None:
    torch.manual_seed(0)
    before, after, truth = torch.randn(7, 11), torch.randn(7, 11), torch.randint(11, (7,))
    found = dict(zip(MEASURES, compare(before, after, truth).T, strict=True))
    p, q = before.softmax(1), after.softmax(1)
    ce = -q.log()[range(7), truth]
    np.testing.assert_allclose(found["ce"], ce, rtol=1e-5)
    np.testing.assert_allclose(found["rise"], ce + p.log()[range(7), truth], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["kl"], (p * (p.log() - q.log())).sum(1), rtol=1e-4)
    assert (found["top1"] == (p.argmax(1) == q.argmax(1)).numpy()).all()


def test_estimates_are_means_over_tokens_and_cover() -> None:
    """The interval covers the true mean about 95 times of 100, with tokens that go together by sample."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        scores = Scores()
        for _ in range(60):
            n = int(rng.integers(3, 30))
            values = rng.normal(2.0 + rng.normal(), 1.0, (n, 1)).repeat(len(MEASURES), axis=1)
            scores.add(values, np.zeros(n, np.uint8))
        estimate = scores.estimates()["kl"]
        covered += abs(estimate.mean - 2.0) < estimate.half_width
    assert 180 <= covered <= 198


def test_a_kind_that_is_not_there_says_so() -> None:
    scores = Scores()
    scores.add(np.ones((2, len(MEASURES))), np.array([0, 3], np.uint8))
    found = scores.to_json()
    assert found["kinds"]["bos"] == "no token of this kind was predicted"
    assert found["kinds"]["template"]["ce"]["mean"] == 1.0


def clt(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clt.cli", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A harvested and trained tiny LLaVA."""
    folder = tmp_path_factory.mktemp("eval")
    tiny.save_llava(folder / "model")
    tiny.write_dataset(folder, n_pictures=20, n_texts=40)
    for command in (
        "harvest model train.jsonl c --val-fraction 0.3 --window 256",
        "train c --run-name r --out r --batch-tokens 256 --latents 40 --k 4 --exclude bos",
    ):
        done = clt(folder, *command.split())
        assert done.returncode == 0, done.stderr
    return folder


def test_eval_with_the_model(folder: Path) -> None:
    """Errors change nothing, each mode has its figures, and eval.json holds them."""
    done = clt(folder, "eval", "r", *MODEL, "--generate", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == json.loads((folder / "r" / "eval.json").read_text())
    modes = found["model"]["modes"]
    assert list(modes) == ["original", "transcoder", "errors", "mean", "zero"]
    assert modes["errors"]["kl"]["mean"] < 1e-6
    assert modes["errors"]["top1"]["mean"] == 1.0
    assert modes["original"]["rise"]["mean"] == 0.0
    assert modes["transcoder"]["kl"]["mean"] > 0
    assert modes["transcoder"]["kinds"]["image"] == "no token of this kind was predicted"
    assert len(found["model"]["generated"]) == 2
    assert set(found["model"]["exact_match"]) == {"original", "replaced"}
    assert list(found["model"]["generated"][0]) == ["id", "truth", "original", "replaced"]
    assert found["model"]["logits"].startswith("not computed: no latent was edited")
    assert found["model"]["mlps_left_at"] == ["bos"]
    with (folder / "c" / "samples.jsonl").open() as lines:
        stored = [json.loads(line) for line in lines]
    assert 0 < modes["original"]["samples"] < len(stored)


def test_eval_of_edits(folder: Path) -> None:
    """An edited model is not called replaced, and the logits that change most are named."""
    done = clt(folder, "eval", "r", *MODEL, "--steer", "1:3=40", "--generate", "1", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["model"]
    assert list(found["modes"]) == ["original", "edit"]
    assert found["modes"]["edit"]["kl"]["mean"] > 0
    assert list(found["generated"][0]) == ["id", "truth", "original", "edited"]
    assert set(found["exact_match"]) == {"original", "edited"}
    assert found["recovered"].startswith("not computed")
    raised, lowered = ([change for _, change in found["logits"][name]] for name in ("raised", "lowered"))
    assert raised == sorted(raised, reverse=True)
    assert lowered == sorted(lowered)
    assert lowered[0] < 0 < raised[0]


def test_mean_changes_of_logits() -> None:
    class Letters:
        def decode(self, ids: list[int]) -> str:
            return "abcdefghijkl"[ids[0]]

    torch.manual_seed(0)
    before, after, changes = torch.randn(7, 12), torch.randn(7, 12), LogitChanges()
    changes.add(before[:3], after[:3])
    changes.add(before[3:], after[3:] + 5.0)  # the same for all tokens: nothing that softmax sees
    mean = [float((after - before)[:, i].mean() - (after - before).mean()) for i in range(12)]
    order = sorted(range(12), key=lambda i: -mean[i])
    found = changes.ends(Letters())
    assert [text for text, _ in found["raised"]] == ["abcdefghijkl"[i] for i in order[:8]]
    assert [text for text, _ in found["lowered"]] == ["abcdefghijkl"[i] for i in order[::-1][:8]]
    np.testing.assert_allclose([by for _, by in found["raised"]], sorted(mean, reverse=True)[:8], rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--model model", "expected --model and --dataset together"),
        ("--steer 1:3=4", "need --model and --dataset"),
        (
            "--model model --dataset train.jsonl --ablate 9:1",
            "expected layer:latent with a layer of [0, 1, 2]",
        ),
        ("--model nowhere/at-all --dataset none.jsonl", "none.jsonl"),
    ],
)
def test_wrong_arguments(folder: Path, options: str, words: str) -> None:
    done = clt(folder, "eval", "r", *options.split())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert words in done.stderr
