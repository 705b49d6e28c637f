"""`clt plan`: sizes from configs, bytes and memory against real caches and runs, a formula for each line."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from measured import train_peak
from planted import write_planted
from transformers import CONFIG_MAPPING, LlavaConfig

from clt.cache_format import CacheWriter, Manifest, open_cache
from clt.cache_format.layout import SITES
from clt.cli import app
from clt.planning.cache_size import CacheSize, cache_bytes, measure_coded
from clt.planning.line import Line
from clt.planning.model_size import FAMILY_DEFAULTS, ModelSize, read_model_size
from clt.planning.plan_config import READ_SPEEDS, plan_of
from clt.planning.prediction import predict
from clt.planning.training import PROCESS_BYTES
from clt.train.config import TranscoderConfig
from clt.train.held_out_memory import held_out_memory
from clt.train.memory import offload_memory, read_memory, step_memory
from clt.train.order import predicted_partners
from clt.train.source import Source

SETTINGS = {
    **dict.fromkeys(("l0", "tokens", "tokens_per_s", "optimizer", "shuffle_windows")),
    "precision": "int8",
    "step_divisor": 8.0,
    "window": 16384,
    "sample_tokens": 1024.0,
    "batch_tokens": 4096,
    "grad_acc_steps": 1,
    "epochs": 1.0,
    "threads": 16,
    "dtype": "float32",
    "buffer_tokens": 8192,
    "read_speeds": READ_SPEEDS,
}
"""The command's defaults"""


def write_config(folder: Path, config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def clt(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clt.cli", *map(str, arguments)], capture_output=True, text=True
    )


@pytest.mark.parametrize("family", FAMILY_DEFAULTS)
def test_sizes_that_a_config_leaves_out_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """LLaVA-1.5's text_config names its family and no sizes."""
    theirs = CONFIG_MAPPING[family]()
    folder = write_config(tmp_path / "m", {"model_type": "llava", "text_config": {"model_type": family}})
    assert read_model_size(str(folder)) == (theirs.hidden_size, theirs.num_hidden_layers)


def test_sizes_of_saved_configs(tmp_path: Path) -> None:
    """Of a vision-language model those of its language model; GPT-2's other names."""
    LlavaConfig(
        text_config={"model_type": "llama", "hidden_size": 96, "num_hidden_layers": 7}
    ).save_pretrained(tmp_path)
    assert read_model_size(str(tmp_path)) == ModelSize(96, 7)
    CONFIG_MAPPING["gpt2"](n_embd=48, n_layer=5).save_pretrained(tmp_path)
    assert read_model_size(str(tmp_path / "config.json")) == ModelSize(48, 5)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model_type": "new"}, "expected hidden_size and num_hidden_layers"),
        ({"hidden_size": "wide", "num_hidden_layers": 2}, "hidden_size: expected a positive number"),
        ([1], "expected an object, found list"),
    ],
)
def test_a_config_without_sizes_is_refused(content: object, words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        read_model_size(str(write_config(tmp_path / "m", content)))


def test_a_hub_id_without_transformers_says_what_to_do(tmp_path: Path) -> None:
    code = "import sys; sys.modules['transformers'] = None; sys.argv = ['clt', 'plan', 'maker/model']; "
    done = subprocess.run(
        [sys.executable, "-c", code + "from clt.cli import main; main()"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "or name a folder that holds its config.json" in done.stderr


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_what_a_cache_shows_predicts_a_longer_one(precision: str, tmp_path: Path) -> None:
    """Code bits measured at one length give the bytes of another within 2 %."""
    short = open_cache(write_planted(tmp_path / "short", 3000, precision=precision))
    size = CacheSize(3, 24, precision, 16.0, 512)
    for tokens in (1500, 7000):
        long = open_cache(write_planted(tmp_path / f"{tokens}", tokens, seed=1, precision=precision))
        predicted = cache_bytes(size, tokens, measure_coded(short)).total
        assert predicted == pytest.approx(long["train"].bytes, rel=0.02)


def test_lines_are_the_trainers_own_functions(tmp_path: Path) -> None:
    """Memory, m and bytes an epoch are what train/memory.py, train/order.py and the cache say."""
    cache = write_planted(tmp_path / "c", 4000, val=200)
    folder = write_config(tmp_path / "m", {"hidden_size": 24, "num_hidden_layers": 3})
    settings = SETTINGS | {"tokens_per_s": 100.0, "batch_tokens": 256, "grad_acc_steps": 2, "epochs": 3.0}
    settings |= {"threads": 2, "buffer_tokens": 1024}
    plan = plan_of(str(folder), cache, "1-2", TranscoderConfig(latents=64, k=4), settings)
    values = {f"{line.section}.{line.key}": line.value for line in predict(plan)}
    source = Source([cache], "train")
    assert plan.sample_tokens == source.tokens_per_sample == 50.0
    sizes = {"tokens": 256, "grad_acc_steps": 2, "optimizer": "adam8", "stored_bytes": (24 + 2) / 24}
    step, offload = step_memory(plan.shape, **sizes), offload_memory(plan.shape, **sizes)
    buffers = read_memory(2, 24, "int8", buffer_tokens=1024, batch_tokens=0, threads=2)
    found = values["training.memory_adam8"]
    held = sum(held_out_memory(plan.shape, 2, "int8")[:2])
    assert found["device"] == max(step.device, step.parameters + step.optimizer + held)
    assert found["host"] > step.batches + buffers.buffers + buffers.decoding
    away = values["training.memory_adam8_offload"]
    resident = offload.step.parameters + offload.step.optimizer
    assert away["device"] == max(offload.step.device, resident + held)
    assert away["host"] - found["host"] == offload.away
    assert values["reading.shuffle_m"] == predicted_partners(256, 50.0, 4000, 512, 1024)
    # the layers 1 and 2 alone
    files = [item for entry in open_cache(cache)["train"].entries for item in entry.files.items()]
    read = sum(file.size for name, file in files if name.endswith((".1.0", ".2.0")) and "/mlp_" in name)
    assert values["reading.bytes_per_epoch"] == pytest.approx(read, rel=0.02)
    assert values["harvest.hours"] == 4000 / 100 / 3600


def test_the_command_explains_every_line(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", {"text_config": {"hidden_size": 64, "num_hidden_layers": 4}})
    told = clt("plan", folder, "--tokens", 1_000_000, "--tokens-per-s", 2000, "--n-targets", 2, "--explain")
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert all(formula.startswith("            = ") for formula in lines[1::2])
    assert len(lines) % 2 == 0
    data = json.loads(
        clt("plan", folder, "--tokens", 1_000_000, "--n-targets", 2, "--explain", "--json").stdout
    )
    formulas = data.pop("formulas")
    assert formulas.keys() == {f"{section}.{key}" for section in data for key in data[section]}
    assert data["cache"]["uncompressed_bytes_per_token"] == 2 * 4 * 64 * 2
    assert data["training"]["parameters"] == 128 * (4 * 65 + 7 * 64) + 4 * 64


def test_codes_of_an_activation_without_k_are_assumed(tmp_path: Path) -> None:
    """As many as --l0 says; without it, every latent."""
    folder = write_config(tmp_path / "m", {"hidden_size": 64, "num_hidden_layers": 4})

    def planned(activation: str, k: int | None, l0: int | None = None, ranks: int = 1) -> dict[str, Line]:
        transcoder = TranscoderConfig(activation=activation, k=k)
        settings = SETTINGS | {"l0": l0, "optimizer": "adam", "ranks": ranks}
        return {line.key: line for line in predict(plan_of(str(folder), None, None, transcoder, settings))}

    assumed, topk = planned("relu", None, l0=7), planned("topk", 7)
    assert assumed["memory_adam"].value == topk["memory_adam"].value
    assert "codes for 7 active latents a layer (--l0)" in assumed["memory_adam"].formula
    bound = planned("relu", None)
    assert bound["memory_adam"].value == planned("topk", 128)["memory_adam"].value
    assert (
        "128 active latents a layer (all, an upper bound; --l0 assumes fewer)" in bound["memory_adam"].formula
    )
    wire = [
        planned(*what, ranks=2)["wire_bytes_per_token"].value for what in (("relu", None, 7), ("topk", 7))
    ]
    assert wire[0] == wire[1] > 0


def test_held_out_numbers_are_planned_where_they_take_more(tmp_path: Path) -> None:
    """Of small micro-batches, no gradients to speak of, and a wide band."""
    folder = write_config(tmp_path / "m", {"hidden_size": 64, "num_hidden_layers": 4})
    settings = SETTINGS | {"optimizer": "adam", "batch_tokens": 64, "buffer_tokens": 64}
    transcoder = TranscoderConfig(latents=16, k=2, n_targets=4)
    plan = plan_of(str(folder), None, None, transcoder, settings)
    value = {line.key: line.value for line in predict(plan)}["memory_adam"]
    step, held = (
        step_memory(plan.shape, tokens=64, stored_bytes=66 / 64),
        held_out_memory(plan.shape, 4, "int8"),
    )
    assert value["device"] == step.parameters + step.optimizer + held.codes + held.values > step.device
    read = read_memory(4, 64, "int8", buffer_tokens=64, batch_tokens=0, threads=16)
    assert value["host"] == PROCESS_BYTES + sum(read) + held.rows


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--optimizer", "sgd"), "--optimizer"),
        (("--layers", "9"), "--layers"),
        (("--tokens", "0"), "--tokens: expected more than 0"),
        (("--read-speeds", "fast"), "--read-speeds"),
        (("--l0", "3"), "--l0: topk has --k"),
        (("--activation", "relu", "--l0", "129"), "--l0: expected 1 to the 128 latents"),
        (("--cache", "none"), "is no cache"),
    ],
)
def test_wrong_arguments_are_told(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path / "m", {"hidden_size": 64, "num_hidden_layers": 4})
    with pytest.raises(ValueError, match=words):
        app(["plan", str(folder), *arguments], standalone_mode=False)


WIDTH, LAYERS = 512, 8


@pytest.fixture(scope="module")
def wide_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wide(tmp_path_factory.mktemp("wide") / "c", val=4)


def write_wide(path: Path, val: int = 0) -> Path:
    """4,096 Gaussian tokens of 8 layers, and val times 1,024 held-out ones."""
    manifest = Manifest(
        d_model=WIDTH,
        layers=tuple(range(LAYERS)),
        precision="int8",
        step_divisor=8.0,
        window=4096,
        seed=0,
        world_size=1,
        source={"model": "wide"},
    )
    rng = np.random.default_rng(0)
    columns = {name: np.zeros(1024, int) for name in ("position", "token_id", "kind", "row", "col")}
    with CacheWriter(path, manifest) as writer:
        for number in range(4 + val):
            values = {site: rng.standard_normal((1024, LAYERS, WIDTH), np.float32) for site in SITES}
            sample = {"sample": np.full(1024, number)}
            split, place = ("train", number) if number < 4 else ("val", number - 4)
            writer.add(split, place, {"sample": number, "id": str(number)}, columns | sample, values)
        writer.finish()
    return path


@pytest.mark.parametrize("optimizer", ["adam", "signum"])
def test_memory_of_a_run_is_as_planned(wide_cache: Path, optimizer: str, tmp_path: Path) -> None:
    """Peak of what `clt train` takes beside Python and torch, in a process of its own, within 10 %."""
    options = ("--latents", 4096, "--n-targets", 2, "--batch-tokens", 256, "--steps", 3, "--threads", 2)
    took = train_peak(wide_cache, tmp_path / "run", *options, "--optimizer", optimizer)
    folder = write_config(tmp_path / "m", {"hidden_size": WIDTH, "num_hidden_layers": LAYERS})
    settings = SETTINGS | {"batch_tokens": 256, "threads": 2, "optimizer": optimizer}
    plan = plan_of(str(folder), wide_cache, None, TranscoderConfig(latents=4096, n_targets=2), settings)
    found = {line.key: line.value for line in predict(plan)}[f"memory_{optimizer}"]["one_machine"]
    assert took.growth == pytest.approx(found - PROCESS_BYTES, rel=0.1)
    assert 0.6 * PROCESS_BYTES < took.before < PROCESS_BYTES
