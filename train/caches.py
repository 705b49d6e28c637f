"""The caches that a run reads as one: each named once, and alike in everything but their data."""

from collections.abc import Sequence
from pathlib import Path

from ..cache_format import Cache, CacheError, open_cache

DATA = {
    "dataset",
    "dataset_split",
    "dataset_fingerprint",
    "tokens",
    "max_samples",
    "image_root",
    "seed",
    "text_column",
    "allow_outside",
    "fetch_urls",
}
"""What of their manifests may differ."""


def open_caches(paths: Sequence[Path], *, io: str, check: bool) -> list[Cache]:
    """Open them as `open_cache` does; CacheError where they cannot be read as one."""
    _require_distinct(paths)
    caches = [open_cache(path, io=io, check=check) for path in paths]
    _require_same_identity(caches)
    return caches


def _require_distinct(paths: Sequence[Path]) -> None:
    """A cache that is named twice would count twice."""
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise CacheError(f"expected each cache once, found {path} twice")


def _require_same_identity(caches: list[Cache]) -> None:
    first = caches[0]
    for other in caches[1:]:
        lines = first.manifest.differences(other.manifest)
        differing = [line for line in lines if line.split(":")[0] not in DATA]
        if differing:
            raise CacheError(
                f"{first.path} and {other.path} cannot be read as one; they differ in: {'; '.join(differing)}"
            )
