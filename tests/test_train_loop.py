"""Runs: what they log and save, that they resume bit for bit, and that they learn."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import LAYERS, write_planted
from safetensors.torch import load_file

from clt.cache_format import CacheError, open_cache
from clt.stopping import StopRequested
from clt.train.checkpoint import load_transcoder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.evaluate import Evaluation, evaluate
from clt.train.loop import open_source, train
from clt.train.metrics import DeadLatents, FiringCounts
from clt.train.optimizer import Optimizer, learning_rate
from clt.train.plan import plan
from clt.train.run_folder import load_config
from clt.train.selection import Selection
from clt.train.source import Source


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("planted") / "c", 4000, val=600)


def configure(cache: Path, run: Path, **options: Any) -> TrainConfig:
    structure = {"k": 4, "latents": 40, "n_targets": 3, **options.pop("structure", {})}
    defaults: dict[str, Any] = {"batch_tokens": 100, "lr": 5e-3, "buffer_tokens": 640, "threads": 2}
    return TrainConfig(
        caches=(cache,), run=run, transcoder=TranscoderConfig(**structure), **{**defaults, **options}
    )


def held_out(config: TrainConfig) -> Evaluation:
    return evaluate(load_transcoder(config.run), open_source(config, "val"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def stop_after(steps: int) -> Any:
    """A check that asks to stop once it was called `steps` times."""
    left = iter(range(steps - 1, -1, -1))

    def check() -> None:
        if next(left) == 0:
            raise StopRequested

    return check


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_held_out_fvu_falls_with_latents_and_with_k(cache: Path, tmp_path: Path) -> None:
    """Well below 1 for both kinds; more latents and a larger k each make it smaller."""

    def score(latents: int, k: int) -> Evaluation:
        config = configure(
            cache, tmp_path / f"{latents}-{k}", epochs=4, structure={"latents": latents, "k": k}
        )
        train(config)
        return held_out(config)

    small, wide, dense = score(12, 2), score(40, 2), score(40, 6)
    assert dense.fvu.mean() < 0.9 * wide.fvu.mean() < 0.9 * 0.95 * small.fvu.mean()
    assert set(dense.fvu_kind) == {"text", "image"}
    assert all(values.mean() < 0.5 for values in dense.fvu_kind.values())


def test_first_fvu_is_one(cache: Path, tmp_path: Path) -> None:
    """Decoders start at zero, so the first prediction is the mean: FVU of the first big batch is near 1."""
    config = configure(cache, tmp_path / "run", batch_tokens=2000, steps=1)
    train(config)
    assert lines(config.run)[0]["fvu"] == pytest.approx(1.0, abs=0.05)


def test_learning_rate_follows_optimiser_steps() -> None:
    """Warm-up reaches the base at its last step, linear decay ends at one part in (total - warm-up)."""
    rates = [learning_rate(step, 1.0, 4, 10, "linear") for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == pytest.approx([1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert learning_rate(9, 1.0, 4, 10, "constant") == 1.0
    assert 0 < learning_rate(9, 1.0, 4, 10, "cosine") < 0.1


def test_accumulation_halves_the_steps_and_keeps_the_schedule(cache: Path, tmp_path: Path) -> None:
    """Two micro-batches a step: half the steps, the same decay to the end."""
    config = configure(cache, tmp_path / "run", grad_acc_steps=2, tokens=1000)
    train(config)
    found = lines(config.run)
    assert [line["step"] for line in found] == [1, 2, 3, 4, 5]
    assert found[-1]["lr"] == pytest.approx(5e-3 / 5)


@pytest.mark.parametrize("variance", ["cache", "batch"])
def test_accumulated_run_equals_the_run_with_larger_batches(
    cache: Path, tmp_path: Path, variance: str
) -> None:
    options: dict[str, Any] = {"batch_tokens": 200, "tokens": 2000, "dtype": "float64"}
    one = configure(cache, tmp_path / "one", fvu_variance=variance, **options)
    two = replace(one, run=tmp_path / "two", batch_tokens=100, grad_acc_steps=2)
    train(one)
    train(two)
    for mine, other in zip(
        load_transcoder(one.run).parameters(), load_transcoder(two.run).parameters(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-8)


def test_plan_takes_whichever_ends_first(cache: Path, tmp_path: Path) -> None:
    source = Source([cache], "train")
    base = configure(cache, tmp_path / "run")
    assert plan(base, source, 40)[:2] == (40, 4000)
    assert plan(replace(base, epochs=0.5), source, 40)[:2] == (20, 2000)
    assert plan(replace(base, tokens=150), source, 40)[:2] == (2, 150)
    assert plan(replace(base, steps=7), source, 40)[:2] == (7, 700)
    default = plan(replace(base, lr=None), source, 2**14)
    assert default.lr == pytest.approx(2e-4)
    assert default.warmup == 4


def test_same_seed_same_weights_whatever_the_threads(cache: Path, tmp_path: Path) -> None:
    for name, threads in (("a", 1), ("b", 4)):
        train(configure(cache, tmp_path / name, steps=8, threads=threads))
    first, second = (weights(tmp_path / name / "step-00000008") for name in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


KILLED_RUN = """
import sys, time
from pathlib import Path
import clt.train.loop as loop
from clt.train.run_folder import load_config
from clt.stopping import stop_on_signals
one = loop.Loop.take_step
def slow(self):
    time.sleep(0.03)
    one(self)
loop.Loop.take_step = slow
config = load_config(Path(sys.argv[1]))
import shutil
shutil.rmtree(sys.argv[1])
with stop_on_signals():
    loop.train(config)
"""


@pytest.mark.parametrize("tie", ["none", "source", "target"])
def test_every_structure_resumes_exactly(cache: Path, tmp_path: Path, tie: str) -> None:
    """Ties and the skip: four steps, stopped and loaded after two, are four steps."""
    structure = {"tie": tie, "skip_connection": True, "n_targets": 2}
    whole, cut = (configure(cache, tmp_path / n, steps=4, structure=structure) for n in ("whole", "cut"))
    train(whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopRequested, "check", stop_after(2))
        with pytest.raises(StopRequested):
            train(cut)
    train(cut, resume=True)
    first, second = (weights(config.run / "step-00000004") for config in (whole, cut))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    model = load_transcoder(cut.run)
    assert (model.shape.tie, model.shape.skip) == (tie, True)
    assert all(bool(weight.any()) for weight in model.W_skip)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_and_resumed_equals_uninterrupted(cache: Path, tmp_path: Path, number: signal.Signals) -> None:
    """Weights, moments and dead counters bit for bit; metrics without a gap or a repeat."""
    options = {"epochs": 2, "steps": 45, "save_every": 4, "batch_tokens": 70, "grad_acc_steps": 2}
    whole, cut = (
        configure(cache, tmp_path / "whole", **options),
        configure(cache, tmp_path / "cut", **options),
    )
    train(whole)
    cut.run.mkdir()
    (cut.run / "config.json").write_text(json.dumps(cut.to_json()))
    process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, str(cut.run)], stderr=subprocess.DEVNULL)
    latest = cut.run / "latest"
    while process.poll() is None and not latest.exists():
        time.sleep(0.01)
    time.sleep(0.1)
    os.kill(process.pid, number)
    process.wait()
    stopped_at = int(latest.read_text().strip().removeprefix("step-"))
    assert 0 < stopped_at < 45, "the test was too slow to interrupt"
    train(cut, resume=True)
    first, second = (weights(config.run / "step-00000045") for config in (whole, cut))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert [line["step"] for line in lines(cut.run)] == list(range(1, 46))
    assert [line["loss"] for line in lines(cut.run)] == [line["loss"] for line in lines(whole.run)]


def test_a_run_that_exists_is_not_overwritten(cache: Path, tmp_path: Path) -> None:
    config = configure(cache, tmp_path / "run", steps=2)
    train(config)
    before = {p: p.read_bytes() for p in config.run.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=r"run exists; choose another --run-name, or go on with --resume"):
        train(config)
    assert train(config, resume=True).fvu is None
    with pytest.raises(ValueError, match=r"trained otherwise.*lr: 0.005 -> 0.1"):
        train(replace(config, lr=0.1), resume=True)
    assert before == {p: p.read_bytes() for p in config.run.rglob("*") if p.is_file()}


def test_resume_without_a_run_says_so(cache: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no run to resume; leave out --resume"):
        train(configure(cache, tmp_path / "run"), resume=True)


def test_config_round_trips(cache: Path, tmp_path: Path) -> None:
    config = configure(cache, tmp_path / "run", steps=1, kinds=("text",), exclude=("sink",))
    train(config)
    assert load_config(config.run) == config


def test_checkpoints_beyond_keep_go_and_nothing_partial_stays(cache: Path, tmp_path: Path) -> None:
    config = configure(cache, tmp_path / "run", steps=5, save_every=1, keep=2)
    train(config)
    assert {path.name for path in config.run.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "report.html",
        "latest",
        "origin.json",
        "step-00000004",
        "step-00000005",
    }
    assert {p.name for p in (config.run / "step-00000005").iterdir()} == {
        "shape.json",
        "trainer.json",
        "trainer.safetensors",
        "layers.0",
        "layers.1",
        "layers.2",
    }


def test_the_model_of_a_cache_is_not_needed(cache: Path, tmp_path: Path) -> None:
    """A run in a process that cannot import transformers, datasets or PIL."""
    code = (
        "import sys\nfor n in ('transformers', 'datasets', 'PIL', 'clt.harvest.run'): sys.modules[n] = None\n"
        f"sys.argv = ['clt', 'train', {str(cache)!r}, '--run-name', 'x', '--out', {str(tmp_path / 'run')!r},"
        " '--steps', '2', '--batch-tokens', '64', '--k', '4', '--json']\n"
        "from clt.cli import main\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 2


def test_layer_subset_trains_only_those(cache: Path, tmp_path: Path) -> None:
    config = configure(cache, tmp_path / "run", layers="0,2", steps=2)
    train(config)
    model = load_transcoder(config.run)
    assert model.shape.layers == (0, 2)
    with pytest.raises(CacheError, match=r"--layers: expected some of the 3 layers 0 to 2, found '0-9'"):
        train(configure(cache, tmp_path / "other", layers="0-9"))


def test_a_loss_that_is_not_finite_stops_and_names_the_layer(cache: Path, tmp_path: Path) -> None:
    config = configure(cache, tmp_path / "run", lr=1e30, epochs=9, save_every=1)
    with pytest.raises(
        ValueError, match=r"step 2: the loss.* not finite in layer 0 .*step-00000001 is its last"
    ):
        train(config)
    assert (config.run / "latest").exists()


def test_a_weight_that_is_not_finite_is_never_saved(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-inf as a bias of step 3 makes a latent silent and the loss no worse; the save of step 4 finds it."""
    apply = Optimizer.apply

    def break_at_3(self: Optimizer, side: str, layer: int, grads: dict[str, torch.Tensor]) -> None:
        apply(self, side, layer, grads)
        if (self._step, side, layer) == (2, "encoder", 1):
            self._model.b_enc[1].data[7] = -torch.inf

    monkeypatch.setattr(Optimizer, "apply", break_at_3)
    config = configure(cache, tmp_path / "run", steps=6, save_every=2)
    with pytest.raises(
        ValueError, match=r"weights are not finite: b_enc of layer 1.*step-00000002 is its last"
    ):
        train(config)
    assert all(p.isfinite().all() for p in load_transcoder(config.run).parameters())
    assert [path.name for path in config.run.glob("*step*")] == ["step-00000002"]


def test_dead_counts_tokens_since_a_positive_activation(cache: Path, tmp_path: Path) -> None:
    config = configure(cache, tmp_path / "run", steps=1)
    train(config)
    dead = DeadLatents(load_transcoder(config.run), after_tokens=100)
    fired = torch.zeros(LAYERS, 40, dtype=torch.int64)
    fired[0, :10] = 3
    dead.update(fired, 60)
    assert dead.share() == [0.0, 0.0, 0.0]
    dead.update(fired, 60)
    assert dead.share() == [0.75, 1.0, 1.0]


def test_firing_counts_cover_the_last_one_to_two_periods(cache: Path, tmp_path: Path) -> None:
    config = configure(cache, tmp_path / "run", steps=1)
    train(config)
    firing = FiringCounts(load_transcoder(config.run), period_tokens=100)
    assert firing.frequency().sum() == 0
    for count in (60, 30, 15, 6, 0, 0):  # of 60 tokens each: a period is full after two steps
        fired = torch.zeros(LAYERS, 40, dtype=torch.int64)
        fired[1, 7] = count
        firing.update(fired, 60)
        expected = {60: 60 / 60, 30: 90 / 120, 15: 105 / 180, 6: 111 / 240}.get(count)
        if expected is not None:
            assert float(firing.frequency()[1, 7]) == expected
    assert float(firing.frequency()[1, 7]) == 21 / 240
    assert int((firing.frequency() > 0).sum()) == 1


def check_intervals(found: Evaluation, error: np.ndarray, truth: np.ndarray, tokens: dict[str, Any]) -> None:
    """The ratio estimator's interval, sample by sample; by layer, and for text alone the mean over layers."""

    def by_sample(values: np.ndarray) -> np.ndarray:
        square = (values**2).sum(axis=2)
        return np.array([square[mine == sample].sum(axis=0) for sample in np.unique(mine)])

    mine = tokens["sample"]
    e, v = by_sample(error), by_sample(truth - truth.mean(axis=0))
    n, rest = len(e), e - e.sum(axis=0) / v.sum(axis=0) * v
    expected = 1.96 * np.sqrt(n / (n - 1) * (rest**2).sum(axis=0)) / v.sum(axis=0)
    np.testing.assert_allclose(found.intervals.fvu_layer, expected, rtol=1e-4)
    text = tokens["kind"] == 0
    mine = mine[text]
    e, v = by_sample(error[text]), by_sample(truth[text] - truth[text].mean(axis=0))
    ratio = ((e - e.sum(axis=0) / v.sum(axis=0) * v) / v.sum(axis=0)).mean(axis=1)
    expected = 1.96 * np.sqrt(n / (n - 1) * (ratio**2).sum())
    assert found.intervals.fvu_kind["text"] == pytest.approx(expected, rel=1e-4)
    assert found.missing["fvu_kind.bos"] == "no such tokens in split val"


def check_latent_intervals(
    found: Evaluation, rest: np.ndarray, truth: np.ndarray, active: np.ndarray, sample: np.ndarray
) -> None:
    """By layer: of explained variance and L0 the ratio estimator's; of dead shares the jackknife's."""
    parts = [sample == one for one in np.unique(sample)]
    n = len(parts)

    def ratio(sums: np.ndarray, base: np.ndarray) -> np.ndarray:
        off = sums - sums.sum(axis=0) / base.sum(axis=0) * base
        return 1.96 * np.sqrt(n / (n - 1) * (off**2).sum(axis=0)) / base.sum(axis=0)

    def summed(values: np.ndarray) -> np.ndarray:
        return np.array([values[part].sum(axis=0) for part in parts])

    deviation = ((truth - truth.mean(axis=0)) ** 2).sum(axis=2)
    expected = ratio(summed((rest**2).sum(axis=2)), summed(deviation))
    np.testing.assert_allclose(found.intervals.explained_layer, expected, rtol=1e-3)
    expected = ratio(summed(active.sum(axis=2)), summed(np.ones(active.shape[:2])))
    np.testing.assert_allclose(found.intervals.l0_layer, expected, atol=1e-12)
    without = np.array([1 - active[~part].any(axis=0).mean(axis=1) for part in parts])
    expected = 1.96 * np.sqrt((n - 1) / n * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
    np.testing.assert_allclose(found.intervals.dead_layer, expected, atol=1e-12)
    off = without.mean(axis=1) - without.mean()
    assert found.intervals.dead == pytest.approx(1.96 * np.sqrt((n - 1) / n * (off**2).sum()), abs=1e-12)


@pytest.mark.parametrize(("tie", "skip"), [("none", False), ("source", True), ("target", True)])
def test_evaluation_equals_the_definition(cache: Path, tmp_path: Path, tie: str, skip: bool) -> None:
    """FVU, by kind and without each offset, L0 and dead share from plain numpy on all held-out tokens."""
    structure = {"tie": tie, "skip_connection": skip}
    config = configure(cache, tmp_path / "run", epochs=2, dtype="float64", structure=structure)
    train(config)
    found = held_out(config)
    model, split = load_transcoder(config.run), open_cache(cache)["val"]
    x, y = (torch.from_numpy(split.read(site)).double() for site in ("mlp_in", "mlp_out"))
    kind = split.tokens()["kind"]
    with torch.no_grad():
        codes, out = model.encode(x), model(x)

    def fvu(error: np.ndarray, truth: np.ndarray) -> np.ndarray:
        return (error**2).sum(axis=(0, 2)) / ((truth - truth.mean(axis=0)) ** 2).sum(axis=(0, 2))

    error, truth = (out - y).numpy(), y.numpy()
    np.testing.assert_allclose(found.fvu, fvu(error, truth), rtol=1e-5)
    for number, name in ((0, "text"), (1, "image")):
        np.testing.assert_allclose(
            found.fvu_kind[name], fvu(error[kind == number], truth[kind == number]), rtol=1e-5
        )
    rest = error - error.mean(axis=0)
    np.testing.assert_allclose(found.explained, 1 - fvu(rest, truth), rtol=1e-5)
    check_intervals(found, error, truth, split.tokens())
    check_latent_intervals(found, rest, truth, (codes > 0).numpy(), split.tokens()["sample"])
    np.testing.assert_allclose(found.l0, (codes > 0).sum(dim=2).double().mean(dim=0))
    np.testing.assert_allclose(found.dead, 1 - (codes > 0).any(dim=0).double().mean(dim=1))
    for offset in range(3):
        kept = []
        with torch.no_grad():
            for t in range(LAYERS):
                total = model.b_dec[t].expand(len(y), -1)
                for s in model.shape.sources(t):
                    if t - s != offset:
                        total = total + codes[:, s] @ model.decoder(s, t)
                kept.append(model.outputs.undo(total, t) + model.skip(x)[:, t])
        expected = fvu((torch.stack(kept, dim=1) - y).numpy(), truth).mean()
        assert found.fvu_without_offset[offset] == pytest.approx(expected, rel=1e-5)


def test_selection_changes_what_counts(cache: Path) -> None:
    text = Source([cache], "val", selection=Selection(kinds=("text",)))
    assert text.n_tokens == 300
    assert text.statistics("mlp_out").tokens == 300
