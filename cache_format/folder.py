"""The cache's folder as several writers share it: whose it is, who writes, and the zarr.json documents."""

import fcntl
import os
import re
from collections.abc import Iterable
from pathlib import Path

from . import layout
from .errors import CacheError
from .files import partial_path, sync_folders, write_file
from .journal import Journal, WindowEntry, read_on, was_cut
from .manifest import Manifest
from .metadata import ROOT, Extent, documents
from .stored import read_manifest

_BEGINNING = re.compile(rf"\.{re.escape(ROOT)}\.\d+\.partial|{layout.JOURNAL}(-\d{{5}})?\.jsonl")
"""Files of a writer that has not named its manifest yet."""


def claim_folder(folder: Path, manifest: Manifest) -> None:
    """Create the folder, or check that what is there is this cache, or nothing."""
    # the second look: another rank may have named the manifest, and gone on, while the folder was listed
    if not _has_root(folder) and not _is_beginning(folder) and not _has_root(folder):
        raise CacheError(f"{folder} exists and is not a cache; choose another folder")
    if _has_root(folder):
        differing = read_manifest(folder).differences(manifest)
        if differing:
            raise CacheError(
                f"{folder} was harvested differently; use another folder, or the arguments and the clt that "
                "began it. Differences (there -> now): " + "; ".join(differing)
            )
    elif not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)  # another rank may be as early
        sync_folders([folder.absolute().parent])


def lock(path: Path) -> int:
    """Open a journal for appending, and hold it: the lock goes with the process, however that ends."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise CacheError(
            f"{path.parent} is being written by another process; wait for it or stop it"
        ) from None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def write_root(folder: Path, manifest: Manifest, rank: int) -> None:
    """Name the manifest, unless another rank has; remove what a crash of this rank left of its documents."""
    expected = documents(manifest, dict.fromkeys(layout.SPLITS, (0, 0)))
    for name in expected:
        partial_path(folder / name, rank).unlink(missing_ok=True)
    if not _has_root(folder):
        write_file(folder / ROOT, expected[ROOT], rank)
    claim_folder(folder, manifest)  # the rank that was first may have had other arguments
    folders = {(folder / name).parent for name in expected}
    missing = sorted(path for path in folders if not path.exists())
    for path in missing:
        path.mkdir(parents=True, exist_ok=True)
    sync_folders(sorted(folders))


def extents_of(manifest: Manifest, windows: Iterable[WindowEntry]) -> dict[str, Extent]:
    """Length of each split's arrays once these windows are committed."""
    extents = dict.fromkeys(layout.SPLITS, (0, 0))
    for entry in windows:
        tokens, number = extents[entry.split]
        end = entry.window * manifest.window + entry.tokens
        extents[entry.split] = (max(tokens, end), max(number, entry.window + 1))
    return extents


class Documents:
    """The zarr.json files, which follow the journals of all writers.

    Each refresh reads on from where the last one stopped, so that late commits cost what early ones cost.
    """

    def __init__(self, folder: Path, manifest: Manifest, rank: int) -> None:
        self.folder, self.manifest, self.rank = folder, manifest, rank
        self._start_over()

    def refresh(self) -> None:
        """Bring every zarr.json up to the journals; again if another rank committed meanwhile."""
        written = None
        while (extents := self._read_on()) != written:
            for name, data in documents(self.manifest, extents).items():
                path = self.folder / name
                if not path.exists() or path.read_bytes() != data:
                    write_file(path, data, self.rank)
            written = extents

    def _start_over(self) -> None:
        names = [layout.log_name(layout.JOURNAL, rank) for rank in range(self.manifest.world_size)]
        self._journals = [Journal(self.folder / name) for name in names]
        self._extents = extents_of(self.manifest, [])

    def _read_on(self) -> dict[str, Extent]:
        if any(was_cut(journal) for journal in self._journals):
            self._start_over()  # a writer took back a line that it could not make durable
        for journal in self._journals:
            found = extents_of(self.manifest, read_on(journal))
            for split, (tokens, windows) in found.items():
                before = self._extents[split]
                self._extents[split] = (max(before[0], tokens), max(before[1], windows))
        return dict(self._extents)


def _has_root(folder: Path) -> bool:
    return (folder / ROOT).exists()


def _is_beginning(folder: Path) -> bool:
    """Whether there is nothing but what writers make before the manifest: partial files, empty journals."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(
        _BEGINNING.fullmatch(path.name) and (path.name.startswith(".") or path.stat().st_size == 0)
        for path in folder.iterdir()
    )
