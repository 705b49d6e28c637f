"""Which model a run belongs to, and where in it; copied from the cache, so that a run stands alone."""

import json
from pathlib import Path
from typing import NamedTuple

from ..cache_format.files import write_file
from ..cache_format.manifest import Scalar

FILE = "origin.json"


class Origin(NamedTuple):
    """What users of a transcoder must know of the model; the cache's manifest says more."""

    model: str
    """Hub id or folder"""
    mlps: str
    """Module path with {} for the layer's number"""
    input_site: str
    """mlp_in or resid_mid"""
    dataset: str
    val_fraction: float
    seed: int
    """With the fraction, decides which samples of the dataset are held out"""

    def mlp(self, layer: int) -> str:
        return self.mlps.format(layer)

    @property
    def scan(self) -> str:
        """The model's name without folders."""
        return Path(self.model).name


def save_origin(run: Path, source: dict[str, Scalar], seed: int) -> None:
    """Both of a cache's manifest."""
    write_file(run / FILE, (json.dumps({**source, "seed": seed}, indent=1) + "\n").encode())


def load_origin(run: Path) -> Origin:
    path = run / FILE
    if not path.exists():
        raise ValueError(f"{run} says not which model it is for: expected a file {FILE}, found none")
    return parse_origin(json.loads(path.read_text()), path)


def parse_origin(data: object, path: Path) -> Origin:
    """Of a file; fields that a cache made by other means lacks are those of a Llama-like model."""
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected an object, found {type(data).__name__}")
    defaults = {"model": "unknown", "mlps": "model.layers.{}.mlp", "input_site": "mlp_in", "dataset": ""}
    found = {name: data.get(name, default) for name, default in defaults.items()}
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: {name}: expected a string, found {value!r}")
    numbers = {"val_fraction": data.get("val_fraction", 1.0), "seed": data.get("seed", 0)}
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{path}: {name}: expected a number, found {value!r}")
    return Origin(**found, val_fraction=float(numbers["val_fraction"]), seed=int(numbers["seed"]))
