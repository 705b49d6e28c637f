"""What every command shares: its exit code, `--json`, and how lists are typed."""

import json
from typing import Annotated, Any

import typer

OK, FAULTY, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130

AsJson = Annotated[bool, typer.Option("--json", help="print one JSON object")]
Threads = Annotated[int | None, typer.Option(min=1, help="decoding threads [default: one a core]")]


def answer(as_json: bool, data: dict[str, Any], text: str) -> None:
    print(json.dumps(data) if as_json else text)


def names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else ()
