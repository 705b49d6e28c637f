"""Many ranks are one process: same weights, same numbers, one layout of checkpoints. In real processes."""

import json
import subprocess
import sys
from dataclasses import replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from planted import write_planted
from ranked_training import copy_run
from safetensors.torch import load_file

from clt.train.checkpoint import checkpoint_folder
from clt.train.config import ACTIVATIONS, TIES, TrainConfig, TranscoderConfig
from clt.train.loop import train
from clt.train.ranks import Mesh, wire_bytes
from clt.train.shape import Shape
from clt.train.source import Source

STEPS = 50


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """By number of layers."""
    root = tmp_path_factory.mktemp("planted")
    return {n: write_planted(root / str(n), 1500, val=200, layers=n) for n in (3, 5)}


def configure(cache: Path, run: Path, **options: Any) -> TrainConfig:
    structure = {"latents": 40, "n_targets": 3, **options.pop("structure", {})}
    if structure.get("activation", "topk") in ("topk", "batchtopk", "groupmax"):
        structure = {"k": 4, **structure}
    defaults: dict[str, Any] = {"batch_tokens": 61, "lr": 5e-3, "buffer_tokens": 640, "threads": 1}
    defaults |= {"epochs": 9, "steps": STEPS, "dtype": "float64", "lr_warmup_steps": 5}
    return TrainConfig(
        caches=(cache,), run=run, transcoder=TranscoderConfig(**structure), **{**defaults, **options}
    )


Job = dict[str, Any]


def job(world: int, config: TrainConfig, **more: Any) -> Job:
    return {"world": world, "config": config.to_json(), **more}


def start(folder: Path, jobs: list[Job]) -> tuple[list[list[int]], str]:
    """Exit codes of the ranks, by group of jobs, and what all of them wrote to stderr."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    script = Path(__file__).with_name("ranked_training.py")
    command = [sys.executable, "-W", "error", str(script), str(folder / "jobs.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    codes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return codes, done.stderr


def run_ranks(folder: Path, jobs: list[Job]) -> None:
    codes, errors = start(folder, jobs)
    assert not any(chain(*codes)), errors[-6000:]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    folder = checkpoint_folder(run)
    return {
        f"{path.relative_to(folder)}:{name}": tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def require_same(one: Path, many: Path, rtol: float) -> None:
    """Same files, the same numbers in them within rounding, and the same lines of metrics."""
    mine, theirs = tensors(one), tensors(many)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        if "replicas, adam8" in str(one) and tensor.dtype.is_floating_point:
            # a code that fell to the other side goes on being different: few are, so the whole is the same
            apart = torch.linalg.vector_norm(theirs[name] - tensor) / torch.linalg.vector_norm(tensor)
            assert apart < rtol, (name, float(apart))
        elif tensor.dtype.is_floating_point:
            scale = float(tensor.abs().max())
            torch.testing.assert_close(
                theirs[name], tensor, rtol=rtol, atol=rtol * scale, msg=f"{many} {name}"
            )
        elif tensor.dtype == torch.uint8:  # adam8: a rounding error may cross the limit between two codes
            assert (theirs[name] != tensor).double().mean() < 1e-3, (many, name)
        else:
            assert torch.equal(theirs[name], tensor), (many, name)
    for expected, found in zip(lines(one), lines(many), strict=True):
        assert expected.keys() == found.keys()
        for name in expected.keys() - {"tokens_per_s", "stall"}:
            assert found[name] == pytest.approx(expected[name], rel=100 * rtol, abs=1e-12), (many, name)


LOSSES = {"auxk_alpha": "auxk", "dead_latent_penalty": "dead_latents", "sparsity_coeff": "sparsity"}
MANY_DEAD = {"latents": 300, "k": 2}
REVIVE = {"auxk_alpha": 0.1, "dead_latent_penalty": 0.1}
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "dead latents": (2, 5, {**REVIVE, "grad_acc_steps": 2, "structure": MANY_DEAD}),
    "tied by target": (3, 5, {"structure": {"tie": "target", "activation": "groupmax"}, "optimizer": "muon"}),
    "replicas": (4, 3, {"structure": {"activation": "batchtopk", "tie": "source"}, "fvu_variance": "batch"}),
}
"""name: (ranks, layers, options)"""
MORE: dict[str, tuple[int, int, dict[str, Any]]] = {
    "tied": (2, 5, {"structure": {"tie": "source", "skip_connection": True}, "optimizer": "signum"}),
    "float32": (2, 5, {"dtype": "float32", "max_grad_norm": 0.05}),
    "adam8": (2, 5, {"dtype": "float32", "optimizer": "adam8", "structure": {"latents": 200}}),
    "bfloat16": (3, 5, {"dtype": "bfloat16", "optimizer": "signum"}),
    "batchtopk": (2, 3, {"structure": {"activation": "batchtopk"}, "k_anneal_steps": 20}),
    "offload": (3, 5, {"offload": "host", "structure": {"skip_connection": True}}),
    "jumprelu": (
        3,
        5,
        {
            "structure": {"activation": "jumprelu", "tie": "source"},
            "sparsity_coeff": 0.01,
            "fvu_variance": "batch",
        },
    ),
    "own layers": (4, 5, {"structure": {"n_targets": 1}}),
    "four": (4, 5, {**REVIVE, "max_grad_norm": 0.05, "save_best": True, "structure": MANY_DEAD}),
    "six": (6, 3, {**REVIVE, "structure": {**MANY_DEAD, "skip_connection": True}}),
    "replicas, relu": (4, 3, {"structure": {"activation": "relu", "tie": "source"}, "sparsity_coeff": 0.01}),
    "replicas, jumprelu": (4, 3, {"structure": {"activation": "jumprelu"}, "sparsity_coeff": 0.01}),
    "five replicas": (5, 3, {"structure": {"activation": "groupmax"}, "optimizer": "muon", "tokens": 185}),
    "replicas, adam8": (4, 3, {"dtype": "float32", "optimizer": "adam8", "structure": {"latents": 200}}),
}


def test_weights_of_many_ranks_are_those_of_one(caches: dict[int, Path], tmp_path: Path) -> None:
    """After 50 steps, in float64 to 1e-9; so are the optimiser's state, counters, and lines of metrics.

    And a run of two ranks that is cut after 20 steps goes on with two bit for bit, and with one or three.
    """
    jobs, pairs = prepared(caches, tmp_path, CASES)
    whole = pairs[0][1]
    cut = [replace(whole, run=tmp_path / f"cut-{world}") for world in (2, 3)]
    copied = {"copy": [str(whole.run), "step-00000020"], "resume": True}
    jobs.insert(1, job(2, cut[0], **copied))
    jobs.insert(2, job(3, cut[1], **copied))
    run_ranks(tmp_path, jobs)
    require_all_same(pairs)
    require_traffic(pairs[1][1], world=3)
    two, three = (tensors(config.run) for config in cut)
    assert all(torch.equal(two[name], tensor) for name, tensor in tensors(whole.run).items())
    assert two.keys() == three.keys()
    require_same(pairs[0][0].run, cut[1].run, 1e-9)
    alone = replace(whole, run=tmp_path / "cut-1")
    copy_run(str(whole.run), "step-00000020", str(alone.run))
    train(alone, resume=True)
    require_same(pairs[0][0].run, alone.run, 1e-9)


@pytest.mark.slow
def test_weights_of_many_ranks_are_those_of_one_in_every_case(
    caches: dict[int, Path], tmp_path: Path
) -> None:
    """Shares without a token are among them (two tokens for five replicas), and fresh starts from other runs.

    What four ranks saved, as shards or as replicas, goes on with one, two and three.
    """
    jobs, pairs = prepared(caches, tmp_path, MORE)
    cases = dict(zip(MORE, pairs, strict=True))
    four, replicas = cases["four"][1], cases["replicas, relu"][1]
    cut = [(3, four), (1, four), (3, replicas), (2, replicas)]
    gone_on = [replace(config, run=tmp_path / f"cut-{n}") for n, (_, config) in enumerate(cut)]
    for (world, whole), config in zip(cut, gone_on, strict=True):
        jobs.append(job(world, config, copy=[str(whole.run), "step-00000020"], resume=True))
    for tie in ("none", "source"):
        structure = {"n_targets": 4, "tie": tie}
        start_from = cases["tied"][0].run if tie == "source" else cases["offload"][0].run
        structure["skip_connection"] = True
        one = configure(caches[5], tmp_path / f"fine-{tie}", finetune=start_from, structure=structure)
        many = replace(one, run=tmp_path / f"fine-{tie}-many")
        train(one)
        jobs.append(job(3, many))
        pairs.append((one, many))
    run_ranks(tmp_path, jobs)
    require_all_same(pairs)
    for (_, whole), config in zip(cut, gone_on, strict=True):
        require_same(whole.run, config.run, 1e-9)
    for name, (_, many) in cases.items():
        if name in ("tied", "float32", "own layers", "replicas, adam8"):
            require_traffic(many, world=MORE[name][0])


@pytest.mark.slow
def test_every_activation_with_two_three_and_four_ranks(caches: dict[int, Path], tmp_path: Path) -> None:
    """Each with decoders of its own and tied both ways, after 50 steps."""
    cases = {}
    for world, activation, tie in product((2, 3, 4), ACTIVATIONS, TIES):
        options: dict[str, Any] = {"structure": {"activation": activation, "tie": tie}, "save_every": 50}
        if activation in ("relu", "jumprelu"):
            options["sparsity_coeff"] = 0.01
        cases[f"{world} {activation} {tie}"] = (world, 5, options)
    jobs, pairs = prepared(caches, tmp_path, cases)
    run_ranks(tmp_path, jobs)
    require_all_same(pairs)


def require_traffic(config: TrainConfig, world: int) -> None:
    """What crossed is what the formulas say, to the byte; what is summed for the log comes on top.

    Chunks that were read are not all tokens, and a shard has an index: bytes read are so to 5 %.
    """
    source = Source(config.caches, "train")
    shape = Shape.of(config.transcoder, source.layers, source.manifest.d_model)
    found = json.loads(Path(f"{config.run}.traffic.json").read_text())
    work = {"float64": 8, "float32": 4}[config.dtype]
    assert len(found) == world
    for rank, measured in enumerate(found):
        mesh = Mesh.of(shape, world, rank)
        expected = wire_bytes(shape, mesh, config.step_tokens, work=work, weight=work)
        for name, value in expected._asdict().items():
            sent = measured["sent"][name] * config.step_tokens
            if name == "sums":
                assert value < sent < value + 16 * 8 * len(source.layers) * 3
            elif name == "replicas" and value:  # and now and then a count for the log
                assert sent == pytest.approx(value, rel=1e-2)
            else:
                share = 1e-9 if mesh.replicas == 1 else 1 / config.step_tokens  # of an odd number of tokens
                assert sent == pytest.approx(value, rel=share), (name, rank)
        assert measured["read"] == pytest.approx(measured["read_predicted"], rel=0.05)


def prepared(
    caches: dict[int, Path], root: Path, cases: dict[str, tuple[int, int, dict[str, Any]]]
) -> tuple[list[Job], list[tuple[TrainConfig, TrainConfig]]]:
    """Train each case in this process; what is left to do with many ranks, and pairs of what to compare."""
    jobs, pairs = [], []
    for name, (world, layers, options) in cases.items():
        one = configure(caches[layers], root / name / "one", **{"save_every": 20, "keep": 9, **options})
        many = replace(one, run=root / name / "many")
        train(one)
        jobs.append(job(world, many))
        pairs.append((one, many))
    return jobs, pairs


def require_all_same(pairs: list[tuple[TrainConfig, TrainConfig]]) -> None:
    for one, many in pairs:
        for option, loss in LOSSES.items():  # or there is nothing to compare
            assert not getattr(one, option) or max(line[loss] for line in lines(one.run)) > 0, one.run
        require_same(one.run, many.run, {"float64": 1e-9, "float32": 1e-3, "bfloat16": 2e-2}[one.dtype])
        places = [json.loads((checkpoint_folder(c.run) / "trainer.json").read_text()) for c in (one, many)]
        assert places[0].pop("held_out_fvu") == pytest.approx(places[1].pop("held_out_fvu"))
        assert places[0] == places[1]
        assert files(one.run) == files(many.run)


def files(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())
