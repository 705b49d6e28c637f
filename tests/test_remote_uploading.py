"""A harvest to a store: what is there is, byte for byte, what a harvest to a folder writes."""

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import pytest
import tiny
from conftest import TinyCache
from object_store import BUCKET, Proxy

from clt.cache_format import CacheError, CacheWriter, open_cache
from clt.remote import store
from clt.remote.copying import Folder, copy_cache
from clt.remote.uploading import Upload

pytest.importorskip("obstore")  # the extra dev has them
pytest.importorskip("moto")

Make = Callable[..., TinyCache]


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    return f"s3://{BUCKET}/{request.node.name}"


def upload(tiny: TinyCache, address: str, bound: int, stop: int | None = None, rank: int = 0) -> None:
    """One writer's harvest into its folder and up, or its first `stop` samples, as if it were killed then."""
    with (
        Upload(address, tiny.path, rank, bound, threads=4) as up,
        CacheWriter(tiny.path, tiny.manifest, rank=rank, threads=2, after_commit=up.wait_for_room) as writer,
    ):
        tiny.feed(writer, rank, stop)
        if stop is None:
            writer.finish()
            up.finish()


def there(address: str, folder: Path) -> dict[str, bytes]:
    copy_cache(store.Store(address), Folder(folder))
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def left(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("c.*") if "/stats/" not in str(path)]


def test_what_is_up_is_the_harvest_and_the_disk_is_free(
    make_cache: Make, plan_cache: Make, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    """Through a network that refuses and cuts, with room for nothing: each window goes before the next."""
    proxy.begin(lambda method, path, nth: ("unavailable", "cut")[nth] if "c.1" in path and nth < 2 else None)
    far = plan_cache("far")
    upload(far, address, bound=0)
    assert not left(far.path)
    assert there(address, tmp_path / "back") == make_cache("near").files()
    assert sum(request.fault is not None for request in proxy.requests) > 20


@pytest.mark.parametrize("same_folder", [True, False])
def test_a_harvest_goes_on_here_or_elsewhere(
    same_folder: bool, make_cache: Make, plan_cache: Make, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    """After it was stopped in the middle; what is up in between is a cache."""
    first = plan_cache("first")
    upload(first, address, bound=0, stop=7)
    copy_cache(store.Store(address), Folder(tmp_path / "between"))
    assert 0 < len(open_cache(tmp_path / "between").windows) < 5
    upload(first if same_folder else first.at(tmp_path / "second"), address, bound=10**9)
    assert there(address, tmp_path / "back") == make_cache("near").files()


def test_a_store_that_stays_away_stops_the_harvest_and_keeps_it(
    make_cache: Make, plan_cache: Make, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    far = plan_cache("far")
    proxy.begin(lambda method, path, nth: "unavailable" if method == "PUT" and "c.1." in path else None)
    with pytest.raises(store.UnreachableError, match="could not put"):
        upload(far, address, bound=0)
    assert left(far.path)
    proxy.begin()
    upload(far, address, bound=0)
    assert there(address, tmp_path / "back") == make_cache("near").files()


@pytest.mark.parametrize("shared", [False, True])
def test_writers_that_go_up_at_once_leave_one_cache(
    shared: bool, make_cache: Make, plan_cache: Make, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    """Each from a folder of its own, or both from one."""
    far = plan_cache("far", world_size=2)
    parts = [far if shared else far.at(tmp_path / str(rank)) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda rank: upload(parts[rank], address, 0, rank=rank), range(2)))
    assert there(address, tmp_path / "back") == make_cache("near", world_size=2).files()


def test_of_two_writers_that_end_together_the_slower_one_tells_of_both(
    make_cache: Make, plan_cache: Make, proxy: Proxy, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one commits its last window while this one puts the documents for readers that know no
    journal: a stranger must see every window."""
    far, near = plan_cache("far", world_size=2), make_cache("near", world_size=2)
    array = "train/token/kind/zarr.json"
    put = store.Store.put

    def put_late(self: store.Store, name: str, data: bytes) -> None:
        if b'"complete"' in data:
            finishing.set()
        elif name == array and finishing.is_set() and not begun.is_set():
            begun.set()
            upload(far.at(far.path.with_name("second")), address, 0, rank=1)
        put(self, name, data)

    begun, finishing = Event(), Event()
    monkeypatch.setattr(store.Store, "put", put_late)
    with (
        Upload(address, far.path, 0, 10**9, threads=4) as up,
        CacheWriter(far.path, far.manifest, threads=2) as writer,
    ):
        far.feed(writer)
        writer.finish()
        up.finish()
    assert begun.is_set()
    assert store.Store(address).get(array) == near.files()[array]


def test_another_cache_in_the_folder_is_refused(
    plan_cache: Make, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    upload(plan_cache("far"), address, bound=0)
    other = plan_cache("other", seed=8)
    other.write()
    with pytest.raises(CacheError, match="belongs to another cache"):
        upload(other, address, bound=0)


def test_the_command_harvests_to_an_address_and_trains_from_it(proxy: Proxy, tmp_path: Path) -> None:
    """As a user types it."""
    tiny.save_llava(tmp_path / "model")
    tiny.write_dataset(tmp_path, n_pictures=6, n_texts=40)
    name = f"s3://{BUCKET}/command"
    for command in (
        ["harvest", "model", "train.jsonl", name, "--window", "512", "--val-fraction", "0.1"],
        ["train", name, "--run-name", "r", "--steps", "2", "--batch-tokens", "256", "--k", "4"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "clt.cli", *command], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    assert not left(next((tmp_path / "staged").iterdir()))
    assert (tmp_path / "checkpoints" / "r" / "report.html").exists()
