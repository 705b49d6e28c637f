"""`clt push` and `clt pull`: a cache, or a part of it, to an object store and back."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..stopping import stop_on_signals
from .answers import AsJson, answer

Layers = Annotated[str | None, typer.Option(help="0-31, 0,4,8 or 0-31:4 [default: all]")]
Windows = Annotated[
    int | None,
    typer.Option(help="the first N of each split, as statistics are sums from the first on [default: all]"),
]
Workers = Annotated[int, typer.Option(help="files on their way at a time")]


def push_command(
    cache: Annotated[Path, typer.Argument(help="folder of a cache")],
    address: Annotated[str, typer.Argument(help="s3://bucket/folder, gs://..., az://...")],
    layers: Layers = None,
    windows: Windows = None,
    threads: Workers = 16,
    as_json: AsJson = False,
) -> None:
    """Copy a cache, or a part of it, to an object store; again, to go on where that was cut off."""
    _copy("push", cache, address, layers, windows, threads, as_json)


def pull_command(
    address: Annotated[
        str, typer.Argument(help="s3://bucket/folder, gs://, az://, https://, hf://datasets/USER/NAME")
    ],
    cache: Annotated[Path, typer.Argument(help="folder to write")],
    layers: Layers = None,
    windows: Windows = None,
    threads: Workers = 16,
    as_json: AsJson = False,
) -> None:
    """Copy a cache, or a part of it, from an object store; again, to go on where that was cut off."""
    _copy("pull", address, cache, layers, windows, threads, as_json)


def _copy(
    verb: str,
    origin: str | Path,
    target: str | Path,
    layers: str | None,
    windows: int | None,
    threads: int,
    as_json: bool,
) -> None:
    if windows is not None and windows < 1:
        raise ValueError(f"--windows: expected at least 1, found {windows}")
    if threads < 1:
        raise ValueError(f"--threads: expected at least 1, found {threads}")
    from ..remote.address import name_of, remote_address
    from ..remote.copying import copy_cache, place_of

    far = target if verb == "push" else origin
    if remote_address(far) is None:
        raise ValueError(f"expected an address such as s3://bucket/folder, found {str(far)!r}")
    with stop_on_signals(), _Bar(verb) as bar:
        copied = copy_cache(
            place_of(origin),
            place_of(target),
            layers=layers,
            windows=windows,
            threads=threads,
            begin=bar.begin,
            progress=lambda size: bar.add(size),
        )
    text = (
        f"{name_of(target)}: {copied.windows} windows of {len(copied.layers)} layers; {copied.files} files "
        f"({copied.bytes / 1e6:.1f} MB) copied and checked, {copied.kept} were there already"
    )
    answer(as_json, copied._asdict(), text)


class _Bar:
    """A progress bar that learns its total once the journals are read."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._progress: Any = None
        self.add: Callable[[int], None] = lambda size: None

    def __enter__(self) -> "_Bar":
        return self

    def begin(self, total: int) -> None:
        from ..progress import Progress

        self._progress = Progress(self._name, total=total, unit="B").__enter__()
        self.add = self._progress.add

    def __exit__(self, *why: Any) -> None:
        if self._progress is not None:
            self._progress.__exit__(*why)
