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

    def mlp(self, layer: int) -> str:
        return self.mlps.format(layer)

    @property
    def scan(self) -> str:
        """The model's name without folders."""
        return Path(self.model).name


def save_origin(run: Path, source: dict[str, Scalar]) -> None:
    """source: of a cache's manifest."""
    write_file(run / FILE, (json.dumps(source, indent=1) + "\n").encode())


def load_origin(run: Path) -> Origin:
    path = run / FILE
    if not path.exists():
        raise ValueError(f"{run} says not which model it is for: expected a file {FILE}, found none")
    return parse_origin(json.loads(path.read_text()), path)


def parse_origin(data: object, path: Path) -> Origin:
    """Of a file; fields that a cache made by other means lacks are those of a Llama-like model."""
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected an object, found {type(data).__name__}")
    defaults = {"model": "unknown", "mlps": "model.layers.{}.mlp", "input_site": "mlp_in"}
    found = {name: data.get(name, default) for name, default in defaults.items()}
    for name, value in found.items():
        if not isinstance(value, str):
            raise ValueError(f"{path}: {name}: expected a string, found {value!r}")
    return Origin(**found)
