"""What goes wrong with a cache: the caller's mistake, or bytes that are not what was written."""


class CacheError(ValueError):
    """The request does not fit the cache: another version, another identity, no such layer or split."""


class DamagedCacheError(CacheError):
    """The cache does not hold what its journal says: a missing, truncated or altered file."""
