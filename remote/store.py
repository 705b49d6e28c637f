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
from typing import Any, NamedTuple, NoReturn, TypeVar

from ..cache_format.errors import CacheError, DamagedCacheError
from ..cache_format.files import checksum
from ..cache_format.journal import FileEntry
from ..stopping import StopRequested
from .faults import first_line, lacks_credentials, no_bucket, way_in, wrong_region

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
ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}
"""By scheme: the variable that permits a server without TLS."""
READ_ONLY = ("https", "http", "hf")
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
        self._answered = False

    def require_writable(self) -> None:
        """CacheError where the address can be read only."""
        if self.address.partition(":")[0] in READ_ONLY:
            raise CacheError(f"{self.address} can be read only; expected s3://, gs:// or az:// to write to")

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
                said = f"{self.address}: {verb} of {name} fails ({first_line(fault)}); trying on"
                print(said, file=sys.stderr)
            if attempt:
                wait = min(self._patience.longest_wait, self._patience.first_wait * 2 ** (attempt - 1))
                time.sleep(wait * (0.5 + random.random() / 2))
            StopRequested.check()
            try:
                found = act()
                self._answered = True
                return found
            except FileNotFoundError as missing:
                self._raise_missing(verb, name, missing)
            except (errors.PermissionDeniedError, errors.UnauthenticatedError) as refused:
                raise CacheError(
                    f"{self.address}: access to {name} was refused; {way_in(self.address)} "
                    f"({first_line(refused)})"
                ) from refused
            except (errors.BaseError, OSError, _SpoiltError) as tried:
                fault = tried
                self._raise_hopeless(verb, fault, attempt)
        assert fault is not None
        if isinstance(fault, _SpoiltError):
            raise DamagedCacheError(
                f"{self.address}/{name}: {fault}, in {self._patience.attempts} attempts; push it again"
            )
        way_out = (
            "run again when the store answers, what was done is kept"
            if self._answered
            else "check the address, the network, and the endpoint if you have set one"
        )
        raise UnreachableError(
            f"{self.address}: could not {verb} {name} in {self._patience.attempts} attempts "
            f"({first_line(fault)}); {way_out}"
        ) from fault

    def _raise_missing(self, verb: str, name: str, missing: Exception) -> NoReturn:
        if verb == "get":
            raise MissingError(
                f"{self.address} has no object {name}; expected a cache there, check the address"
            ) from None
        raise CacheError(
            f"{self.address}: there is no such bucket; create it, or check its name"
        ) from missing

    def _raise_hopeless(self, verb: str, fault: Exception, attempt: int) -> None:
        """CacheError where waiting does not help. A machine's own credentials may be late, but only once."""
        if verb == "list" and no_bucket(fault):
            self._raise_missing(verb, "", fault)
        if wrong_region(fault):
            raise CacheError(
                f"{self.address}: the bucket lies in another region; set AWS_REGION ({first_line(fault)})"
            ) from fault
        if lacks_credentials(fault) and attempt and not self._answered:
            raise CacheError(
                f"{self.address}: expected credentials, found none in the environment and none of this "
                f"machine; {way_in(self.address)}"
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
        "allow_http": address.startswith("http://")
        or os.environ.get(ALLOW_HTTP.get(address.partition(":")[0], "")) == "true",
    }
    if headers:
        options["default_headers"] = headers
    try:
        settings: dict[str, Any] = {"client_options": options, "retry_config": {"max_retries": 0}}
        objects = obstore.store.from_url(address, **settings)
    except (ValueError, obstore.exceptions.BaseError) as fault:
        raise CacheError(f"{address}: {first_line(fault)}; {way_in(address)}") from fault
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
