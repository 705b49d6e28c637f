"""`clt import`: a run from what circuit-tracer or clt-training hold, a layer in memory at a time."""

import json
import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..cache_format.files import write_file
from ..train.checkpoint import LATEST
from ..train.config import TrainConfig, TranscoderConfig
from ..train.origin import save_origin
from ..train.shape import Shape
from .circuit_tracer import HOOKS

STEP = "step-00000000"
SITES_OF = {hook: site for site, hook in HOOKS.items()}


class Foreign(Protocol):
    """A transcoder in another package's files."""

    shape: Shape
    input_site: str
    model: str

    def encoder(self, source: int) -> dict[str, Tensor]:
        """W_enc, b_enc, and where there are thresholds log_threshold; sums and logarithms in float64."""
        ...

    def decoder(self, source: int, target: int) -> Tensor: ...

    def bias(self, target: int) -> Tensor: ...


class CircuitTracer:
    """A folder with `model_kind: cross_layer_transcoder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        settings = _read_settings(folder / "config.yaml")
        if settings.get("model_kind") != "cross_layer_transcoder":
            raise ValueError(
                f"{folder}: expected model_kind cross_layer_transcoder, found {settings.get('model_kind')!r}"
            )
        hook = settings.get("feature_input_hook", "")
        if hook not in SITES_OF:
            raise ValueError(
                f"{folder}: expected feature_input_hook {' or '.join(SITES_OF)}, found {hook!r}; "
                "what lies before a norm's gain is not among the cache's sites"
            )
        self.input_site, self.model = SITES_OF[hook], settings.get("model_name", "unknown")
        layers = tuple(range(len(list(folder.glob("W_enc_*.safetensors")))))
        with self._open("W_enc", 0) as file:
            latents, width = file.get_slice("W_enc_0").get_shape()
            jumps = "threshold_0" in file.keys()  # noqa: SIM118 - a safetensors file, not a dict
        self.shape = Shape(
            layers=layers,
            d_model=width,
            n_latents=latents,
            k=None,
            n_targets=1,
            activation="jumprelu" if jumps else "relu",
            bandwidth=2.0 if jumps else None,
        )
        self.shape = Shape(**{**asdict(self.shape), "n_targets": self._reach()})

    def encoder(self, source: int) -> dict[str, Tensor]:
        with self._open("W_enc", source) as file:
            tensors = {name: file.get_tensor(f"{name}_{source}") for name in ("W_enc", "b_enc")}
            if self.shape.activation == "jumprelu":
                threshold = file.get_tensor(f"threshold_{source}").double()
                if (threshold < 0).any():
                    raise ValueError(
                        f"{self.folder}: thresholds of layer {source} are negative; expected none"
                    )
                tensors["log_threshold"] = threshold.log()
        return tensors

    def decoder(self, source: int, target: int) -> Tensor:
        with self._open("W_dec", source) as file:
            weight: Tensor = file.get_slice(f"W_dec_{source}")[:, target - source]
        return weight

    def bias(self, target: int) -> Tensor:
        with self._open("W_enc", target) as file:
            bias: Tensor = file.get_tensor(f"b_dec_{target}")
        return bias

    def _reach(self) -> int:
        """Targets of a source, beyond which all decoders are zeros."""
        layers = self.shape.n_layers
        for offset in reversed(range(1, layers)):
            if any(self.decoder(source, source + offset).any() for source in range(layers - offset)):
                return offset + 1
        return 1

    def _open(self, name: str, layer: int) -> Any:
        return safe_open(self.folder / f"{name}_{layer}.safetensors", "pt")


class CltTraining:
    """A folder of `layers.<l>.mlp`, each with its own decoders."""

    input_site, model = "mlp_in", "unknown"
    REFUSED = (
        "skip_connection",
        "normalize_io",
        "post_encoder_scale",
        "per_source_tied",
        "secondary_target_tied",
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        numbers = sorted(int(path.name.split(".")[1]) for path in folder.glob("layers.*.mlp"))
        if not numbers:
            raise ValueError(f"{folder}: expected folders layers.<l>.mlp, found none")
        self._names = [f"layers.{number}.mlp" for number in numbers]
        configs = [json.loads((folder / name / "cfg.json").read_text()) for name in self._names]
        for config, name in zip(configs, self._names, strict=True):
            self._require(config, name)
        first, k = configs[0], tuple(int(config["k"]) for config in configs)
        latents = int(first["num_latents"])
        jumps = bool(self._read(0, "post_encs.0").any())
        kind = "jumprelu" if jumps else "relu" if set(k) == {latents} else "topk"
        if jumps and set(k) != {latents}:
            raise ValueError(f"{folder}: has both thresholds and a top-k; expected one of them")
        self.shape = Shape(
            layers=tuple(numbers),
            d_model=int(first["d_in"]),
            n_latents=latents,
            k=k if kind == "topk" else None,
            n_targets=max(int(config["n_targets"]) for config in configs),
            activation=kind,
            bandwidth=2.0 if jumps else None,
        )

    def encoder(self, source: int) -> dict[str, Tensor]:
        tensors = {"W_enc": self._read(source, "encoder.weight"), "b_enc": self._read(source, "encoder.bias")}
        if self.shape.activation == "jumprelu":
            threshold = self._read(source, "post_encs.0")
            tensors["b_enc"] = tensors["b_enc"].double() + threshold.double()  # exact, so that it comes back
            tensors["log_threshold"] = threshold.double().log()
        return tensors

    def decoder(self, source: int, target: int) -> Tensor:
        return self._read(source, f"W_decs.{target - source}")

    def bias(self, target: int) -> Tensor:
        parts = [self._read(s, f"b_decs.{target - s}") for s in self.shape.sources(target)]
        return torch.stack(parts).sum(dim=0)

    def _require(self, config: dict[str, Any], name: str) -> None:
        wanted = {"activation": "topk", "transcode": True, "coalesce_topk": "none"}
        wanted |= dict.fromkeys(self.REFUSED, False)
        for key, value in wanted.items():
            if config.get(key, value) != value:
                raise ValueError(f"{self.folder / name}: expected {key} {value!r}, found {config[key]!r}")

    def _read(self, source: int, name: str) -> Tensor:
        with safe_open(self.folder / self._names[source] / "sae.safetensors", "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


READERS: dict[str, type[CircuitTracer] | type[CltTraining]] = {
    "circuit-tracer": CircuitTracer,
    "clt-training": CltTraining,
}


def import_run(folder: Path, run: Path, format_name: str, model: str | None = None) -> Shape:
    """Write a run folder, whole or not at all, that eval, export and --finetune take."""
    if format_name not in READERS:
        raise ValueError(f"--format: expected one of {', '.join(READERS)}, found {format_name!r}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder, found none")
    if run.exists():
        raise ValueError(f"{run} exists; choose another folder, or remove it")
    foreign: Foreign = READERS[format_name](folder)
    partial = run.with_name(f".{run.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write(foreign, partial, run, model or foreign.model)
        os.replace(partial, run)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return foreign.shape


def _write(foreign: Foreign, partial: Path, run: Path, model: str) -> None:
    shape, step = foreign.shape, partial / STEP
    for target, layer in enumerate(shape.layers):
        folder = step / f"layers.{layer}"
        folder.mkdir(parents=True)
        decoders = [foreign.decoder(source, target) for source in shape.sources(target)]
        neutral = {"in_mean": torch.zeros(shape.d_model), "in_scale": torch.ones(())}
        neutral |= {"out_mean": torch.zeros(shape.d_model), "out_scale": torch.ones(())}
        tensors = {"W_dec": torch.stack(decoders), "b_dec": foreign.bias(target), **neutral}
        tensors |= foreign.encoder(target)
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "transcoder.safetensors"
        )
    (step / "shape.json").write_text(json.dumps(asdict(shape)))
    structure = TranscoderConfig(
        activation=shape.activation,
        k=shape.k,
        bandwidth=shape.bandwidth,
        latents=shape.n_latents,
        n_targets=shape.n_targets,
    )
    config = TrainConfig(
        caches=(), run=run, transcoder=structure, sparsity_coeff=None if shape.layer_k else 0.0
    )
    write_file(partial / "config.json", (json.dumps(config.to_json(), indent=1) + "\n").encode())
    save_origin(partial, {"model": model, "input_site": foreign.input_site}, seed=0)
    write_file(partial / LATEST, STEP.encode())


def _read_settings(path: Path) -> dict[str, str]:
    """A YAML file of `key: text` lines, which is all that the format asks for."""
    if not path.exists():
        raise ValueError(f"{path.parent}: expected a file {path.name}, found none")
    pairs = [line.partition(":") for line in path.read_text().splitlines() if ":" in line]
    return {key.strip(): value.strip().strip("'\"") for key, _, value in pairs if not key.startswith("#")}
