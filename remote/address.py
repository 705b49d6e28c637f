"""Which names are addresses. Imports nothing, so that commands and configs may ask."""

import re
from pathlib import Path

SCHEMES = ("s3", "gs", "az", "https", "http", "hf")
_ADDRESS = re.compile(rf"({'|'.join(SCHEMES)}):/+(.+)")


def remote_address(name: str | Path) -> str | None:
    """`s3://bucket/folder` of what was typed, or of the Path `s3:/bucket/folder` made of it; else None."""
    found = _ADDRESS.fullmatch(str(name))
    return f"{found[1]}://{found[2].rstrip('/')}" if found else None


def name_of(place: str | Path) -> str:
    """As a user writes it: a Path has lost one of the two slashes of an address."""
    return remote_address(place) or str(place)
