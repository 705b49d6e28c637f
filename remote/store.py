"""Objects below an address, by name; what goes wrong on the way is tried again, with longer and longer waits.

obstore speaks to S3, Google, Azure and plain HTTP; its own retries are off, so that there is one rule: this
module's. A body that ends early, or is not what the journal says, counts as something that went wrong.
"""

import os
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

from ..cache_format.errors import CacheError, DamagedCacheError
from ..cache_format.files import checksum
from ..cache_format.journal import FileEntry
from ..stopping import StopRequested

T = TypeVar("T")


class Patience(NamedTuple):
    """How long a store may stay away."""

    attempts: int = 9
    first_wait: float = 0.25
    """Seconds; each wait is twice the one before, times a random share of 0.5 to 1"""
    longest_wait: float = 30.0
    silence: float = 30.0
    """Seconds without a byte after which an answer is given up"""


PATIENCE = Patience()
SAID_AT = 3
"""Attempts after which the user is told that there are more."""


class MissingError(CacheError):
    """There is no such object."""


class UnreachableError(OSError):
    """A store did not give, or take, an object in all attempts."""


class _SpoiltError(Exception):
    """A body that is not the whole object."""


Check = Callable[[bytes], object]
"""Raises CacheError where the bytes are not what they must be."""


@dataclass(frozen=True)
class FileCheck:
    """That bytes have the size and checksum that the journal says."""

    entry: FileEntry

    def __call__(self, data: bytes) -> None:
        if len(data) != self.entry.size:
            raise DamagedCacheError(f"it has {len(data)} bytes, expected {self.entry.size}")
        if checksum(data) != self.entry.crc32c:
            raise DamagedCacheError(f"its crc32c is {checksum(data)}, expected {self.entry.crc32c}")


class Store:
    """One address; thread-safe."""

    def __init__(self, address: str, patience: Patience = PATIENCE) -> None:
        self.address, self._patience = address, patience
        self._obstore, self._objects = _open(address, patience)
        self.bytes_read = 0
        """Bytes of bodies that were kept; for reports, not exact under threads"""

    def get(self, name: str, check: Check | None = None) -> bytes:
        """The whole object; tried again where `check` raises CacheError.

        Of an object that nothing is known of, the size is asked for before.

        Raises CacheError where there is none, DamagedCacheError where it has other bytes in every attempt,
        UnreachableError where the store does not answer.
        """

        def act() -> bytes:
            size = None if isinstance(check, FileCheck) else self._obstore.head(self._objects, name)["size"]
            data = bytes(self._obstore.get(self._objects, name).bytes())
            if size is not None and len(data) != size:
                raise _SpoiltError(f"its body ended after {len(data)} of {size} bytes")
            try:
                if check is not None:
                    check(data)
            except CacheError as fault:
                raise _SpoiltError(str(fault)) from fault
            return data

        data = self._persist("get", name, act)
        self.bytes_read += len(data)
        return data

    def put(self, name: str, data: bytes) -> None:
        """Store the object, whole or not at all."""
        self._persist("put", name, lambda: self._obstore.put(self._objects, name, data))

    def sizes(self, below: str = "") -> dict[str, int]:
        """Bytes of every object whose name begins with the folder `below`."""

        def act() -> dict[str, int]:
            batches = self._obstore.list(self._objects, prefix=below or None)
            return {meta["path"]: meta["size"] for batch in batches for meta in batch}

        return self._persist("list", below or self.address, act)

    def _persist(self, verb: str, name: str, act: Callable[[], T]) -> T:
        """`act` until it succeeds; what cannot succeed is not tried again."""
        errors = _errors()
        fault: Exception | None = None
        for attempt in range(self._patience.attempts):
            if attempt == SAID_AT:
                print(f"{self.address}: {verb} of {name} fails ({_first(fault)}); trying on", file=sys.stderr)
            if attempt:
                wait = min(self._patience.longest_wait, self._patience.first_wait * 2 ** (attempt - 1))
                time.sleep(wait * (0.5 + random.random() / 2))
            StopRequested.check()
            try:
                return act()
            except FileNotFoundError as missing:
                if verb != "get":
                    raise CacheError(f"{self.address}: there is no such bucket ({_first(missing)})") from None
                raise MissingError(f"{self.address} has no object {name}; expected a cache there") from None
            except (errors.PermissionDeniedError, errors.UnauthenticatedError) as refused:
                raise CacheError(
                    f"{self.address}: access to {name} was refused; set the store's credentials, such as "
                    f"AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY ({_first(refused)})"
                ) from refused
            except (errors.BaseError, OSError, _SpoiltError) as tried:
                fault = tried
        assert fault is not None
        if isinstance(fault, _SpoiltError):
            raise DamagedCacheError(
                f"{self.address}/{name}: {fault}, in {self._patience.attempts} attempts; push it again"
            )
        raise UnreachableError(
            f"{self.address}: could not {verb} {name} in {self._patience.attempts} attempts "
            f"({_first(fault)}); run again when the store answers, what was done is kept"
        ) from fault


def _open(address: str, patience: Patience) -> tuple[Any, Any]:
    try:
        import obstore
    except ImportError:
        raise CacheError(f"{address} needs the extra remote: pip install 'clt-cache[remote]'") from None
    headers: dict[str, str] = {}
    if address.startswith("hf://"):
        address, headers = _hugging_face(address.removeprefix("hf://"))
    options: dict[str, Any] = {
        "read_timeout": timedelta(seconds=patience.silence),
        "timeout": timedelta(hours=1),  # silence is what counts; a large shard may take its time
        "connect_timeout": timedelta(seconds=min(10.0, patience.silence)),
        "allow_http": address.startswith("http://") or os.environ.get("AWS_ALLOW_HTTP") == "true",
    }
    if headers:
        options["default_headers"] = headers
    try:
        settings: dict[str, Any] = {"client_options": options, "retry_config": {"max_retries": 0}}
        objects = obstore.store.from_url(address, **settings)
    except (ValueError, obstore.exceptions.BaseError) as fault:
        raise CacheError(f"{address}: {_first(fault)}") from fault
    return obstore, objects


def _hugging_face(name: str) -> tuple[str, dict[str, str]]:
    """Address and headers of `datasets/USER/NAME[@REVISION][/FOLDER]`, whose files are plain HTTP objects."""
    from huggingface_hub import get_token
    from huggingface_hub.constants import ENDPOINT

    parts = name.split("/")
    if parts[0] != "datasets" or len(parts) < 3:
        raise CacheError(f"hf://{name}: expected hf://datasets/USER/NAME[@REVISION][/FOLDER]")
    repository, _, revision = parts[2].partition("@")
    folder = "/".join(["resolve", revision or "main", *parts[3:]])
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return f"{ENDPOINT}/datasets/{parts[1]}/{repository}/{folder}", headers


def _errors() -> Any:
    from obstore import exceptions

    return exceptions


def _first(fault: BaseException | None) -> str:
    """The first line of an error that has many."""
    return str(fault).strip().partition("\n")[0][:300]
