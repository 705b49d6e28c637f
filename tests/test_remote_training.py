"""Training from an object store: the weights are those of training from a folder, within bounded room."""

import json
import random
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from object_store import (
    BUCKET,
    FAULTS,
    IMPATIENT,
    Proxy,
    web_server,
    write_certificate,
)
from planted import write_planted

from clt.cache_format import DamagedCacheError, open_cache
from clt.remote import staging, store
from clt.remote.copying import Folder, copy_cache
from clt.train.checkpoint import load_transcoder
from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.loop import open_source, train
from clt.train.reader import Reader
from clt.train.run_folder import load_config

pytest.importorskip("obstore")  # the extra dev has them
pytest.importorskip("moto")

WINDOWS, TOKENS = 8, 8 * 512


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("local") / "c", TOKENS, val=600)


@pytest.fixture
def remote(local: Path, proxy: Proxy) -> Path:
    """The same cache on the store, as the command line gives it."""
    address = f"s3://{BUCKET}/planted"
    copy_cache(Folder(local), store.Store(address))
    proxy.begin()
    return Path(address)


def config(cache: Path, run: Path, **more: Any) -> TrainConfig:
    options = {"batch_tokens": 256, "buffer_tokens": 512, "epochs": 2, "threads": 2, "save_every": 5} | more
    return TrainConfig(caches=(cache,), run=run, transcoder=TranscoderConfig(latents=32, k=4), **options)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_transcoder(run).state_dict()


def shard_gets(proxy: Proxy, split: str = "train") -> Counter[str]:
    paths = (request.path for request in proxy.requests if request.method == "GET")
    return Counter(path for path in paths if f"planted/{split}/mlp_" in path)


def room(folder: Path) -> int:
    found = 0
    for path in folder.rglob("train/mlp_*/c.*"):
        with suppress(FileNotFoundError):  # it was evicted meanwhile
            found += path.stat().st_size
    return found


def shard_bytes(cache: Path) -> int:
    files = [item for entry in open_cache(cache)["train"].entries for item in entry.files.items()]
    return sum(file.size for name, file in files if name.startswith("train/mlp_"))


@pytest.mark.parametrize("fault", [None, *FAULTS])
def test_weights_are_those_of_local_training(
    fault: str | None,
    local: Path,
    remote: Path,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With room for a third of the cache, while every answer of some is spoilt once; each shard comes once
    an epoch, or less, and never more room is taken than was given."""
    total = shard_bytes(local)
    bound = total // 3
    largest = 0

    def spoil(method: str, path: str, nth: int) -> str | None:
        nonlocal largest
        largest = max(largest, room(tmp_path / "stage"))
        chosen = "/mlp_" in path and random.Random(path).random() < (0.05 if fault == "slow" else 0.2)
        return fault if chosen and nth == 0 else None

    proxy.begin(spoil)
    if fault == "slow":
        monkeypatch.setattr(store.Store.__init__, "__defaults__", (IMPATIENT,))
    train(config(remote, tmp_path / "far", stage_dir=tmp_path / "stage", stage_gb=bound / 1e9))
    assert 0.5 * bound < largest <= bound
    gets = shard_gets(proxy)
    assert len(gets) == 4 * 3 * WINDOWS
    assert fault == "slow" or max(gets.values()) <= 2 + (fault is not None)  # a busy machine is slow, too
    train(config(local, tmp_path / "near", shuffle_windows=1))
    for name, tensor in weights(tmp_path / "near").items():
        assert torch.equal(tensor, weights(tmp_path / "far")[name]), name
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1] for run in ("far", "near")]
    assert json.loads(lines[0])["fvu"] == json.loads(lines[1])["fvu"]


def test_where_all_fits_the_order_is_the_usual_one(
    local: Path, remote: Path, proxy: Proxy, tmp_path: Path
) -> None:
    """Every shard comes once, and a second run with the same folder fetches none; only layers in use come."""
    stage = tmp_path / "stage"
    train(config(remote, tmp_path / "far", stage_dir=stage, layers="0,2"))
    gets = shard_gets(proxy)
    assert max(gets.values()) == 1
    assert len(gets) == 4 * 2 * WINDOWS
    assert not [path for path in gets if path.endswith(".1.0")]
    proxy.begin()
    train(config(remote, tmp_path / "again", stage_dir=stage, layers="0,2"))
    assert not shard_gets(proxy)
    train(config(local, tmp_path / "near", layers="0,2"))
    for name, tensor in weights(tmp_path / "near").items():
        assert torch.equal(tensor, weights(tmp_path / "far")[name]), name
        assert torch.equal(tensor, weights(tmp_path / "again")[name]), name


def test_a_web_server_with_tls_is_trained_from(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificate = write_certificate(tmp_path / "certificate.pem")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with web_server(local.parent, certificate) as address:
        far = config(
            Path(f"{address}/{local.name}"), tmp_path / "far", stage_dir=tmp_path / "stage", layers="0"
        )
        train(far)
    assert load_config(far.run).caches == far.caches
    train(config(local, tmp_path / "near", layers="0"))
    for name, tensor in weights(tmp_path / "near").items():
        assert torch.equal(tensor, weights(far.run)[name]), name


def test_a_staged_file_that_was_altered_is_fetched_again(remote: Path, proxy: Proxy, tmp_path: Path) -> None:
    """Between two processes anything can happen to a folder."""
    settings = config(remote, tmp_path / "run", stage_dir=tmp_path / "stage")
    source = open_source(settings, "train")
    with Reader(source, buffer_tokens=512, seed=0, threads=1) as reader:
        first = reader.next(TOKENS)
    shard = next((tmp_path / "stage").rglob("train/mlp_in/c.3.1.0"))
    data = shard.read_bytes()
    shard.write_bytes(data[:9] + bytes([data[9] ^ 4]) + data[10:])
    proxy.begin()
    with Reader(open_source(settings, "train"), buffer_tokens=512, seed=0, threads=1) as reader:
        again = reader.next(TOKENS)
    assert list(shard_gets(proxy)) == [f"/{BUCKET}/planted/train/mlp_in/c.3.1.0"]
    for site in ("mlp_in", "mlp_out"):
        np.testing.assert_array_equal(first.rows.codes[site], again.rows.codes[site])
    assert shard.read_bytes() == data


def test_a_shard_that_stays_damaged_stops_the_run(remote: Path, proxy: Proxy, tmp_path: Path) -> None:
    proxy.begin(lambda method, path, nth: "altered" if path.endswith("train/mlp_out/c.2.0.0") else None)
    with pytest.raises(DamagedCacheError, match=r"train/mlp_out/c\.2\.0\.0: its crc32c is"):
        train(config(remote, tmp_path / "run", stage_dir=tmp_path / "stage"))


def test_too_little_room_is_told(remote: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--stage-gb: expected at least .*fewer --shuffle-windows"):
        train(config(remote, tmp_path / "run", stage_dir=tmp_path / "s", stage_gb=1e-5, shuffle_windows=4))


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(
    remote: Path, proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another folder, with nothing staged."""
    bound = {"stage_gb": 0.0002}
    train(config(remote, tmp_path / "whole", stage_dir=tmp_path / "a", **bound))
    monkeypatch.setattr(staging.Stage, "close", lambda self: self._pool.shutdown(cancel_futures=True))
    half = config(remote, tmp_path / "run", stage_dir=tmp_path / "b", **bound)

    class Enough(Exception):
        pass

    def stop(path: str) -> None:
        raise Enough

    from clt.train.loop import Loop

    save = Loop.save

    def save_and_stop(self: Loop, measure: bool = True) -> None:
        save(self, measure)
        raise Enough

    monkeypatch.setattr(Loop, "save", save_and_stop)
    with pytest.raises(Enough):
        train(half)
    monkeypatch.setattr(Loop, "save", save)
    train(config(remote, tmp_path / "run", stage_dir=tmp_path / "c", **bound), resume=True)
    for name, tensor in weights(tmp_path / "whole").items():
        assert torch.equal(tensor, weights(tmp_path / "run")[name]), name
