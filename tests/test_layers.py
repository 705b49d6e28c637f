"""Data flows one way, and a training box needs neither transformers nor datasets."""

import subprocess
import sys

import pytest

RULES = [
    ("clt.cache_format", ["torch", "transformers", "datasets", "clt.harvest", "clt.train"]),
    ("clt.harvest.run", ["obstore", "clt.train", "clt.analysis", "clt.export"]),
    (
        "clt.train.loop",
        ["wandb", "obstore", "transformers", "datasets", "PIL", "clt.harvest", "clt.analysis", "clt.export"],
    ),
    ("clt.train.evaluate", ["wandb", "transformers", "datasets", "PIL", "clt.harvest"]),
    ("clt.train.checkpoint", ["wandb", "transformers", "datasets", "PIL", "clt.harvest"]),
    ("clt.export.run", ["transformers", "datasets", "PIL", "clt.harvest"]),
    ("clt.remote.staging", ["torch", "transformers", "datasets", "obstore", "clt.harvest", "clt.train"]),
    ("clt.remote.uploading", ["torch", "transformers", "datasets", "obstore", "clt.harvest", "clt.train"]),
    ("clt.remote.copying", ["torch", "transformers", "datasets", "obstore", "clt.harvest", "clt.train"]),
    ("clt.planning.prediction", ["torch", "transformers", "datasets", "clt.harvest"]),
    ("clt.analysis.features", ["wandb", "transformers", "datasets"]),
    ("clt.cli", ["torch", "numpy", "zarr", "numcodecs", "transformers", "datasets"]),
]


@pytest.mark.parametrize(("module", "forbidden"), RULES)
def test_import_never_pulls_in(module: str, forbidden: list[str]) -> None:
    """The module imports in a fresh process in which the forbidden ones cannot be imported."""
    block = "".join(f"sys.modules[{name!r}] = None; " for name in forbidden)
    subprocess.run([sys.executable, "-c", f"import sys; {block}import {module}"], check=True)


def test_help_imports_nothing_heavy() -> None:
    """`clt --help` and the help of each command import no numpy, torch, zarr or transformers."""
    block = "".join(f"sys.modules[{n!r}] = None; " for n in ("torch", "numpy", "zarr", "transformers"))
    names = ("harvest", "plan", "push", "pull", "info", "verify", "train", "eval", "features", "export")
    for command in ([], *([name] for name in names)):
        code = (
            f"import sys; {block}sys.argv = ['clt', *{command!r}, '--help']; from clt.cli import main; main()"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "Usage: clt" in done.stdout
