"""Transcoders in the files of circuit-tracer and clt-training, read a matrix at a time."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor, stack

from ..train.shape import Shape
from .circuit_tracer import HOOKS

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

    def skip(self, target: int) -> Tensor:
        """(d_model out, d_model in); asked for only where the shape has one."""
        ...


class CircuitTracer:
    """A folder with `model_kind: cross_layer_transcoder`."""

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self.input_site, self.model = _site(folder, settings), settings.get("model_name", "unknown")
        layers = tuple(range(len(list(folder.glob("W_enc_*.safetensors")))))
        with self._open("W_enc", 0) as file:
            latents, width = file.get_slice("W_enc_0").get_shape()
            jumps = "threshold_0" in file.keys()  # noqa: SIM118 - a safetensors file, not a dict
        self.shape = _shape(layers, width, latents, jumps=jumps)
        self.shape = replace(self.shape, n_targets=self._reach())

    def encoder(self, source: int) -> dict[str, Tensor]:
        with self._open("W_enc", source) as file:
            tensors = {name: file.get_tensor(f"{name}_{source}") for name in ("W_enc", "b_enc")}
            if self.shape.activation == "jumprelu":
                threshold = file.get_tensor(f"threshold_{source}")
                tensors["log_threshold"] = _logarithm(threshold, self.folder, source)
        return tensors

    def decoder(self, source: int, target: int) -> Tensor:
        with self._open("W_dec", source) as file:
            weight: Tensor = file.get_slice(f"W_dec_{source}")[:, target - source]
        return weight

    def bias(self, target: int) -> Tensor:
        with self._open("W_enc", target) as file:
            bias: Tensor = file.get_tensor(f"b_dec_{target}")
        return bias

    def skip(self, target: int) -> Tensor:
        raise NotImplementedError("this format has none")

    def _reach(self) -> int:
        """Targets of a source, beyond which all decoders are zeros."""
        layers = self.shape.n_layers
        for offset in reversed(range(1, layers)):
            if any(self.decoder(source, source + offset).any() for source in range(layers - offset)):
                return offset + 1
        return 1

    def _open(self, name: str, layer: int) -> Any:
        return safe_open(self.folder / f"{name}_{layer}.safetensors", "pt")


class TranscoderSet:
    """A folder with `model_kind: transcoder_set`: a file a layer, each layer for itself."""

    THRESHOLD = "activation_function.threshold"

    def __init__(self, folder: Path, settings: dict[str, str]) -> None:
        self.folder = folder
        self.input_site, self.model = _site(folder, settings), settings.get("model_name", "unknown")
        layers = tuple(range(len(list(folder.glob("layer_*.safetensors")))))
        if not layers:
            raise ValueError(f"{folder}: expected files layer_<l>.safetensors, found none")
        with safe_open(self._path(0), "pt") as file:
            names = set(file.keys())
            latents, width = file.get_slice("W_enc").get_shape()
        self.shape = _shape(layers, width, latents, jumps=self.THRESHOLD in names, skip="W_skip" in names)

    def encoder(self, source: int) -> dict[str, Tensor]:
        tensors = {name: self._read(source, name) for name in ("W_enc", "b_enc")}
        if self.shape.activation == "jumprelu":
            threshold = self._read(source, self.THRESHOLD)
            tensors["log_threshold"] = _logarithm(threshold, self.folder, source)
        return tensors

    def decoder(self, source: int, target: int) -> Tensor:
        return self._read(source, "W_dec")

    def bias(self, target: int) -> Tensor:
        return self._read(target, "b_dec")

    def skip(self, target: int) -> Tensor:
        return self._read(target, "W_skip")

    def _read(self, layer: int, name: str) -> Tensor:
        with safe_open(self._path(layer), "pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _path(self, layer: int) -> Path:
        return self.folder / f"layer_{layer}.safetensors"


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
        return stack(parts).sum(dim=0)

    def skip(self, target: int) -> Tensor:
        raise NotImplementedError("refused by `_require`")

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


def open_circuit_tracer(folder: Path) -> Foreign:
    """Either of the two kinds that its config.yaml may name."""
    settings = _read_settings(folder / "config.yaml")
    kinds: dict[str, type[CircuitTracer] | type[TranscoderSet]] = {
        "cross_layer_transcoder": CircuitTracer,
        "transcoder_set": TranscoderSet,
    }
    kind = settings.get("model_kind", "")
    if kind not in kinds:
        raise ValueError(f"{folder}: expected model_kind {' or '.join(kinds)}, found {kind!r}")
    return kinds[kind](folder, settings)


READERS: dict[str, Callable[[Path], Foreign]] = {
    "circuit-tracer": open_circuit_tracer,
    "clt-training": CltTraining,
}


def _read_settings(path: Path) -> dict[str, str]:
    """A YAML file of `key: text` lines, which is all that the format asks for."""
    if not path.exists():
        raise ValueError(f"{path.parent}: expected a file {path.name}, found none")
    pairs = [line.partition(":") for line in path.read_text().splitlines() if ":" in line]
    return {key.strip(): value.strip().strip("'\"") for key, _, value in pairs if not key.startswith("#")}


def _shape(layers: tuple[int, ...], width: int, latents: int, *, jumps: bool, skip: bool = False) -> Shape:
    """Each layer for itself; jumps: there are thresholds."""
    return Shape(
        layers=layers,
        d_model=width,
        n_latents=latents,
        k=None,
        n_targets=1,
        activation="jumprelu" if jumps else "relu",
        bandwidth=2.0 if jumps else None,
        skip=skip,
    )


def _site(folder: Path, settings: dict[str, str]) -> str:
    """What the transcoder reads, as the cache calls it."""
    hook = settings.get("feature_input_hook", "")
    if hook not in SITES_OF:
        raise ValueError(
            f"{folder}: expected feature_input_hook {' or '.join(SITES_OF)}, found {hook!r}; "
            "what lies before a norm's gain is not among the cache's sites"
        )
    return SITES_OF[hook]


def _logarithm(threshold: Tensor, folder: Path, layer: int) -> Tensor:
    """Of thresholds (latent,), in float64, so that they come back."""
    if (threshold < 0).any():
        raise ValueError(f"{folder}: thresholds of layer {layer} are negative; expected none")
    return threshold.double().log()
