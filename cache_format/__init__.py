"""The cache on disk: FORMAT.md is its specification, this package writes, reads and verifies it.

Knows numpy, numcodecs and Zarr's layout; never torch, harvest or train.
"""

from .errors import CacheError, DamagedCacheError
from .manifest import Manifest
from .reader import Cache, Split, open_cache
from .verify import verify_cache
from .writer import CacheWriter

__all__ = [
    "Cache",
    "CacheError",
    "CacheWriter",
    "DamagedCacheError",
    "Manifest",
    "Split",
    "open_cache",
    "verify_cache",
]
