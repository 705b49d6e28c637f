"""gs:// is what s3:// is: copied there and back, harvested to, trained from, while answers are spoilt.

moto's server stands for Google's XML interface, which speaks S3's words; Google's own has not been asked.
"""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import TinyCache
from object_store import BUCKET, FAULTS, Proxy
from planted import write_planted
from test_remote_training import config, shard_gets, weights
from test_remote_uploading import there, upload

from clt.remote import store
from clt.remote.copying import Folder, copy_cache
from clt.train.loop import train

Make = Callable[..., TinyCache]


def spoil(method: str, path: str, nth: int) -> str | None:
    """Each fault but slowness, of every fourth object, the first time it is asked for."""
    dice = random.Random(path)
    return dice.choice(FAULTS[:-1]) if "/c." in path and nth == 0 and dice.random() < 0.25 else None


def test_there_and_back_through_faults(make_cache: Make, proxy: Proxy, tmp_path: Path) -> None:
    tiny = make_cache(world_size=2)
    address = f"gs://{BUCKET}/there"
    proxy.begin(spoil)
    copy_cache(Folder(tiny.path), store.Store(address))
    assert there(address, tmp_path / "back") == tiny.files()
    assert len({request.fault for request in proxy.requests}) == len(FAULTS)
    assert copy_cache(Folder(tiny.path), store.Store(address)).files == 0  # what is there is listed
    part = copy_cache(store.Store(address), Folder(tmp_path / "part"), layers="2", windows=1)
    assert (part.layers, part.windows) == ((2,), 2)


def test_a_harvest_goes_there(make_cache: Make, plan_cache: Make, proxy: Proxy, tmp_path: Path) -> None:
    address = f"gs://{BUCKET}/harvest"
    proxy.begin(spoil)
    first = plan_cache("first")
    upload(first, address, bound=0, stop=7)
    upload(first.at(tmp_path / "second"), address, bound=0)  # on another machine
    assert there(address, tmp_path / "back") == make_cache("near").files()


def test_trained_from_there_it_is_the_same_run(proxy: Proxy, tmp_path: Path) -> None:
    local = write_planted(tmp_path / "local", 2048, val=100)
    address = f"gs://{BUCKET}/planted"
    copy_cache(Folder(local), store.Store(address))
    proxy.begin(spoil)
    train(config(Path(address), tmp_path / "far", stage_dir=tmp_path / "stage", layers="0,2"))
    assert len(shard_gets(proxy)) == 4 * 2 * 4  # arrays, layers, windows
    train(config(local, tmp_path / "near", layers="0,2"))
    for name, tensor in weights(tmp_path / "near").items():
        assert torch.equal(tensor, weights(tmp_path / "far")[name]), name
