"""A folder of pages while it is made: whose it is, how far each layer is, and when all is done.

.work/identity.json            what was asked, so that another command does not go on with it
.work/layer-<l>.safetensors    a layer's statistics, where its pass was left; .work/codes-<l>/ its codes
.work/layer-<l>.json           the layer's pages are written
features.json                  everything is: identity and report; .work is gone
"""

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save

from ..cache_format.files import write_file
from ..train.source import Source
from .code_file import CodeFile
from .features_config import FeaturesConfig
from .latents import LatentStatistics

WORK = ".work"
DONE = "features.json"


class LayerDone(NamedTuple):
    """What is known of a layer whose pages are written."""

    samples: list[int]
    """That its examples show"""
    active: int
    """Latents that were positive for some token"""


class FeaturesFolder:
    def __init__(self, out: Path) -> None:
        self.out = out

    def begin(self, identity: dict[str, Any]) -> bool:
        """Make it, or find in it what this call began, or (True) finished; ValueError for anything else."""
        there: dict[str, Any] | None = None
        if self._done.exists():
            there = json.loads(self._done.read_text())["identity"]
        elif self._identity.exists():
            there = json.loads(self._identity.read_text())
        if there is not None:
            differing = [name for name, value in identity.items() if there.get(name) != value]
            if differing:
                raise ValueError(
                    f"{self.out} holds other pages (another {', another '.join(differing)}); remove it, or "
                    "choose another --out"
                )
            return self._done.exists()
        if self.out.exists() and any(self.out.iterdir()):
            raise ValueError(f"{self.out} exists and is no folder of pages; choose another --out")
        self._work.mkdir(parents=True, exist_ok=True)
        write_file(self._identity, json.dumps(identity).encode())
        return False

    def restore(self, layer: int, statistics: LatentStatistics) -> tuple[int, CodeFile]:
        """Where the layer was left: the next group of chunks, and its codes so far."""
        scratch, path = self._work / f"codes-{layer}", self._state(layer)
        if not path.exists():
            return 0, CodeFile(scratch)
        with safe_open(path, "pt") as file:
            at = file.metadata()
            statistics.restore({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return int(at["group"]), CodeFile(scratch, int(at["tokens"]), int(at["codes"]))

    def save(self, layer: int, statistics: LatentStatistics, group: int, codes: CodeFile) -> None:
        """The layer goes on here, with this group of chunks, also after a crash of the machine."""
        codes.sync()
        at = {"group": str(group), "tokens": str(codes.tokens), "codes": str(codes.codes)}
        write_file(self._state(layer), save({n: t.cpu() for n, t in statistics.state().items()}, at))

    def finish_layer(self, layer: int, done: LayerDone, codes: CodeFile) -> None:
        """Its scratch goes."""
        write_file(self._layer(layer), json.dumps(done._asdict()).encode())
        self._state(layer).unlink()
        codes.remove()

    def layer(self, layer: int) -> LayerDone | None:
        """None: its pages are still to be written."""
        path = self._layer(layer)
        return LayerDone(**json.loads(path.read_text())) if path.exists() else None

    def finish(self, report: dict[str, Any]) -> None:
        done = {"identity": json.loads(self._identity.read_text()), "report": report}
        write_file(self._done, (json.dumps(done, indent=1) + "\n").encode())
        shutil.rmtree(self._work)

    def report(self) -> dict[str, Any]:
        """Of a folder that is done."""
        found: dict[str, Any] = json.loads(self._done.read_text())["report"]
        return found

    @property
    def _work(self) -> Path:
        return self.out / WORK

    @property
    def _done(self) -> Path:
        return self.out / DONE

    @property
    def _identity(self) -> Path:
        return self._work / "identity.json"

    def _state(self, layer: int) -> Path:
        return self._work / f"layer-{layer}.safetensors"

    def _layer(self, layer: int) -> Path:
        return self._work / f"layer-{layer}.json"


def identity_of(config: FeaturesConfig, checkpoint: Path, source: Source) -> dict[str, Any]:
    """What pages of one folder must agree in, in words for people."""
    return {
        "checkpoint": f"{checkpoint.parent.name}/{checkpoint.name}",
        "weights": _weights_stamp(checkpoint),
        "cache": source.fingerprint,
        "split": config.split,
        "selection": source.selection.to_json(),
        "model": config.model,
        "examples": [*config.sizes, config.quantiles, config.similar, config.batch_tokens],
    }


def _weights_stamp(checkpoint: Path) -> int:
    """Bytes of all weights and when they were written: another run of the same name is another one."""
    files = sorted(checkpoint.glob("layers.*/transcoder.safetensors"))
    return sum(file.stat().st_size + file.stat().st_mtime_ns for file in files)
