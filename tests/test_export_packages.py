"""Exports in the hands of the packages they are for, each in its own environment, made when it is missing.

`make test-all` runs these; the first time, pip fetches about 1.6 GB a package into .consumers/.
"""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_run import save_run
from transformers import AutoProcessor, LlamaForCausalLM, LlavaForConditionalGeneration, PreTrainedModel

from clt.export.run import export_run
from clt.train.calibrate import calibrate
from clt.train.checkpoint import load_transcoder
from clt.train.shape import Shape
from clt.train.transcoder import CrossLayerTranscoder

HERE = Path(__file__).parent
DEMO = HERE.parent / "demo"
sys.path.insert(0, str(DEMO))  # the demo's modules are scripts beside each other, not a package

import llava  # noqa: E402
import shapes  # noqa: E402
import train_eyes  # noqa: E402

SHAPE = Shape(
    layers=tuple(range(tiny.LAYERS)),
    d_model=tiny.WIDTH,
    n_latents=120,
    k=None,
    n_targets=2,
    activation="jumprelu",
    bandwidth=2.0,
)
pytestmark = pytest.mark.slow


def python_with(package: str) -> Path:
    """The interpreter of an environment that has the package."""
    folder = HERE.parent / ".consumers" / package
    ready, python = folder / "ready", folder / "bin" / "python"
    wanted = HERE / "consumers" / f"{package}.txt"
    if not ready.exists() or ready.stat().st_mtime < wanted.stat().st_mtime:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", wanted], check=True)
        ready.touch()
    return python


def check(package: str, *arguments: Path) -> None:
    script = HERE / "consumers" / f"check_{package.replace('-', '_')}.py"
    command = [python_with(package), script, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    print(done.stdout)


@torch.no_grad()
def with_gains(model: PreTrainedModel) -> PreTrainedModel:
    """Norms whose gains are not 1, so that before and after them are not the same."""
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            parameter.uniform_(0.5, 2.0)
    return model.eval()


def language_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    inner = model.model
    return inner.language_model.layers if hasattr(inner, "language_model") else inner.layers


@torch.no_grad()
def reference(
    model: PreTrainedModel, transcoder: CrossLayerTranscoder, inputs: dict[str, torch.Tensor], path: Path
) -> Path:
    """What Hugging Face's hooks see, and what our transcoder makes of it."""
    seen: dict[str, list[torch.Tensor]] = {"x": [], "y": []}

    def keep(module: torch.nn.Module, args: tuple[torch.Tensor], out: torch.Tensor) -> None:
        seen["x"].append(args[0][0])
        seen["y"].append(out[0])

    hooks = [layer.mlp.register_forward_hook(keep) for layer in language_layers(model)]
    logits = model(**inputs).logits[0]
    for hook in hooks:
        hook.remove()
    x, y = (torch.stack(values, dim=1).float() for values in seen.values())
    outputs = transcoder(x)
    found = {
        "tokens": inputs["input_ids"],
        "x": x,
        "y": y,
        "activations": transcoder.encode(x),
        "outputs": outputs,
        "error": y - outputs,
        "logits": logits,
        **({"pixels": inputs["pixel_values"]} if "pixel_values" in inputs else {}),
    }
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in found.items()}, path)
    return path


def text_model(folder: Path) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    tiny.save_llama(folder)
    model = with_gains(LlamaForCausalLM.from_pretrained(folder))
    model.save_pretrained(folder)
    plain = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "</s>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(plain))  # as transformers 4 reads it, too
    return model, {"input_ids": torch.tensor([[0, 20, 31, 7, 99, 14, 63, 5]])}


def picture_model(folder: Path) -> tuple[PreTrainedModel, dict[str, torch.Tensor]]:
    tiny.save_llava(folder)
    model = with_gains(LlavaForConditionalGeneration.from_pretrained(folder))
    model.save_pretrained(folder)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (tiny.SIDE, tiny.SIDE, 3), np.uint8))
    inputs = AutoProcessor.from_pretrained(folder)(
        images=picture, text="<image>\nwhat is it a red circle", return_tensors="pt"
    )
    return model, {name: inputs[name] for name in ("input_ids", "pixel_values")}


@pytest.mark.parametrize("shape", [SHAPE, replace(SHAPE, n_targets=1)], ids=["cross-layer", "per-layer"])
def test_circuit_tracer(tmp_path: Path, shape: Shape) -> None:
    """Loaded lazily and eagerly; activations, error vectors and the attribution graph of a text prompt."""
    model, inputs = text_model(tmp_path / "model")
    transcoder = save_run(tmp_path / "run", shape)
    expected = reference(model, transcoder, inputs, tmp_path / "reference.safetensors")
    export_run(tmp_path / "run", tmp_path / "out", "circuit-tracer")
    check("circuit-tracer", tmp_path / "out", tmp_path / "model", expected)


def test_sae_lens_with_a_picture(tmp_path: Path) -> None:
    """A LLaVA with our latents attached: its logits stay with error terms, and the latents are ours."""
    model, inputs = picture_model(tmp_path / "model")
    transcoder = save_run(tmp_path / "run", SHAPE)
    expected = reference(model, transcoder, inputs, tmp_path / "reference.safetensors")
    export_run(tmp_path / "run", tmp_path / "out", "sae-lens")
    check("sae-lens", tmp_path / "out", tmp_path / "model", expected)


def test_sae_lens_runs_the_demo_with_a_picture(tmp_path: Path) -> None:
    """The same of the demo's LLaVA, which describes the picture: its own run where `make demo` left one."""
    folder, run = tmp_path / "model", DEMO / "out" / "run"
    llava.save_llava(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    number = shapes.UNSEEN[7]
    text = train_eyes.prompt(processor, "Describe the picture.") + shapes.caption(number)
    inputs = processor(images=shapes.draw(number), text=text, return_tensors="pt")
    chosen = {name: inputs[name] for name in ("input_ids", "pixel_values")}
    if run.exists():
        calibrate(run, tmp_path / "run", caches=(DEMO / "out" / "shapes.cache",), tokens=8192)
        transcoder = load_transcoder(tmp_path / "run")
    else:
        layers = tuple(range(model.config.text_config.num_hidden_layers))
        width = model.config.text_config.hidden_size
        transcoder = save_run(tmp_path / "run", replace(SHAPE, layers=layers, d_model=width, n_latents=1152))
    expected = reference(model, transcoder, chosen, tmp_path / "reference.safetensors")
    export_run(tmp_path / "run", tmp_path / "out", "sae-lens")
    check("sae-lens", tmp_path / "out", folder, expected)


@pytest.mark.parametrize("activation", ["topk", "groupmax", "relu"])
def test_sparsify(tmp_path: Path, activation: str) -> None:
    """Outputs of per-layer transcoders, with a skip connection."""
    model, inputs = text_model(tmp_path / "model")
    k = None if activation == "relu" else 6
    shape = replace(SHAPE, n_targets=1, activation=activation, k=k, bandwidth=None, skip=True)
    expected = reference(model, save_run(tmp_path / "run", shape), inputs, tmp_path / "reference.safetensors")
    export_run(tmp_path / "run", tmp_path / "out", "sparsify")
    check("sparsify", tmp_path / "out", expected)
