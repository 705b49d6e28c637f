"""`clt info` and `clt verify`: what a cache holds, and whether it is whole."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from ..remote.address import remote_address
from .answers import FAULTY, AsJson, answer


def info(
    cache: Annotated[Path, typer.Argument(help="folder of a cache, or s3://bucket/folder and the like")],
    token: Annotated[
        int | None, typer.Option(help="where this token comes from, counted in the order on disk")
    ] = None,
    split: Annotated[str, typer.Option(help="with --token: train or val")] = "train",
    dataset: Annotated[
        str | None, typer.Option(help="with --token: where the dataset lies now [default: where it lay]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """What a cache holds: tokens by split and kind, bytes, bits a value, noise by layer."""
    from ..cache_format import open_cache
    from ..cache_format.summary import render_summary, summarise_cache
    from ..progress import Progress

    if address := remote_address(cache):
        if token is not None:
            raise ValueError(f"--token needs a cache's files; `clt pull {address} FOLDER` brings them")
        from ..remote.staging import open_described

        with tempfile.TemporaryDirectory() as folder:
            summary = summarise_cache(open_described(address, Path(folder)))
        answer(as_json, summary, render_summary(summary, address))
        return
    opened = open_cache(cache, check=False)
    if token is not None:
        from ..cache_format.provenance import trace_token
        from ..harvest.provenance import read_source, render_token

        trace = trace_token(opened, split, token)
        found = read_source(trace, opened.manifest.source, dataset)
        answer(as_json, {**trace, "source": found._asdict()}, render_token(trace, found))
        return
    with Progress("look at files", total=opened.n_files, unit="files", leave=False) as progress:
        opened.check_files(progress.add)
    summary = summarise_cache(opened)
    answer(as_json, summary, render_summary(summary, str(cache)))


def verify(
    cache: Annotated[Path, typer.Argument(help="folder of a cache")],
    full: Annotated[bool, typer.Option("--full", help="check and decode every byte")] = False,
    as_json: AsJson = False,
) -> None:
    """Check a cache: existence, sizes and indexes of all files; --full: every checksum. Exit 1 on a fault."""
    from ..cache_format import open_cache, verify_cache
    from ..progress import Progress

    if address := remote_address(cache):
        raise ValueError(
            f"expected the folder of a cache, found {address}; `clt pull {address} FOLDER` copies it and "
            "checks every file on the way"
        )
    opened = open_cache(cache, check=False)  # a folder that is no cache is a wrong argument, not a fault
    with Progress("verify", total=opened.n_files, unit="files") as progress:
        faults = verify_cache(opened, full, progress.add)
    text = (
        "\n".join(faults)
        if faults
        else f"{cache}: no fault found{'' if full else ' (sizes and indexes; --full reads all)'}"
    )
    answer(as_json, {"faults": faults, "full": full}, text)
    if faults:
        raise typer.Exit(FAULTY)
