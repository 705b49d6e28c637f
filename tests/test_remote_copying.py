"""Push and pull against a real S3 server, through a proxy that spoils answers: whole copies, or a refusal."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyCache
from object_store import (
    BUCKET,
    ELSEWHERE,
    FAULTS,
    IMPATIENT,
    QUICK,
    FolderHandler,
    Proxy,
    free_port,
    web_server,
    write_certificate,
)

from clt.cache_format import CacheError, DamagedCacheError, open_cache, verify_cache
from clt.remote import faults
from clt.remote.address import remote_address
from clt.remote.copying import Folder, copy_cache
from clt.remote.store import Store, UnreachableError

pytest.importorskip("obstore")  # the extra dev has them
pytest.importorskip("moto")

Make = Callable[..., TinyCache]


@pytest.fixture
def address(request: pytest.FixtureRequest) -> str:
    """A folder of the bucket that no other test uses."""
    return f"s3://{BUCKET}/{request.node.name.replace('[', '-').replace(']', '')}"


def clt(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "clt.cli", *map(str, arguments)], capture_output=True, text=True
    )


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_there_and_back_is_the_same_bytes(
    make_cache: Make, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    """Several writers, both splits, logs and documents; and once more copies nothing."""
    tiny = make_cache(world_size=2)
    store = Store(address, QUICK)
    sent = copy_cache(Folder(tiny.path), store)
    assert sent.windows == len(open_cache(tiny.path).windows)
    copy_cache(store, Folder(tmp_path / "back"))
    assert files(tmp_path / "back") == tiny.files()
    assert copy_cache(Folder(tiny.path), store).files == 0
    assert copy_cache(store, Folder(tmp_path / "back")).files == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_what_a_network_does_costs_time_and_no_bytes(
    fault: str, make_cache: Make, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    """Objects, every fourth at most, are spoilt the first two times they are asked for, both ways."""
    tiny = make_cache(lengths=(100, 60, 70))
    store = Store(address, IMPATIENT if fault == "slow" else QUICK)

    def spoil(method: str, path: str, nth: int) -> str | None:
        listed = path.count("/") > 2
        often = (1, 0.1) if fault == "slow" else (2, 0.25)
        return fault if listed and nth < often[0] and random.Random(path).random() < often[1] else None

    proxy.begin(spoil)
    copy_cache(Folder(tiny.path), store, threads=8)
    copy_cache(store, Folder(tmp_path / "back"), threads=8)
    assert files(tmp_path / "back") == tiny.files()
    assert sum(request.fault is not None for request in proxy.requests) > 4


def test_an_object_that_stays_damaged_is_named(
    make_cache: Make, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    """It is never written, and the windows before it are."""
    tiny = make_cache()
    store = Store(address, QUICK)
    copy_cache(Folder(tiny.path), store)
    proxy.begin(lambda method, path, nth: "altered" if path.endswith("/train/mlp_out/c.1.2.0") else None)
    with pytest.raises(DamagedCacheError, match=r"train/mlp_out/c\.1\.2\.0: its crc32c is"):
        copy_cache(store, Folder(tmp_path / "back"))
    assert not (tmp_path / "back" / "train" / "mlp_out" / "c.1.2.0").exists()
    assert [entry.window for entry in open_cache(tmp_path / "back")["train"].entries] == [0]
    proxy.begin()
    again = copy_cache(store, Folder(tmp_path / "back"))
    assert again.kept > 0
    assert files(tmp_path / "back") == tiny.files()


def test_a_store_that_stays_away_is_told_in_one_line(
    make_cache: Make, proxy: Proxy, address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proxy.begin(lambda method, path, nth: "unavailable")
    with pytest.raises(UnreachableError, match=r"could not list .* in 6 attempts"):
        copy_cache(Folder(make_cache().path), Store(address, QUICK))
    assert "fails (" in capsys.readouterr().err
    proxy.begin()
    with pytest.raises(CacheError, match=r"has no object zarr\.json; expected a cache there"):
        copy_cache(Store(address, QUICK), Folder(tmp_path / "back"))


@pytest.mark.parametrize("precision", ["int8", "bf16"])
def test_some_layers_are_what_a_harvest_of_them_writes(
    precision: str, make_cache: Make, plan_cache: Make, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    """Byte for byte, statistics included; and only their shards were fetched."""
    tiny = make_cache(precision=precision)
    store = Store(address, QUICK)
    copy_cache(Folder(tiny.path), store)
    proxy.begin()
    copy_cache(store, Folder(tmp_path / "part"), layers="0,5")
    asked = [request.path for request in proxy.requests if "/mlp_" in request.path]
    assert not [path for path in asked if "stats" not in path and path.endswith(".1.0")]
    harvested = plan_cache("direct", precision=precision, layers=(0, 5))
    for sample in harvested.samples:
        sample.columns.update(tiny.samples[sample.number].columns)
        for site, values in tiny.samples[sample.number].values.items():
            sample.values[site] = np.ascontiguousarray(values[:, [0, 2]])
    harvested.write()
    assert files(tmp_path / "part") == harvested.files()
    assert not verify_cache(tmp_path / "part", full=True)
    with pytest.raises(CacheError, match=r"other layers of this one.*layers: \[0, 5\] -> \[0\]"):
        copy_cache(store, Folder(tmp_path / "part"), layers="0")


def test_the_first_windows_are_a_cache_that_can_grow(
    make_cache: Make, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    tiny = make_cache()
    copy_cache(Folder(tiny.path), Store(address, QUICK), windows=1)
    proxy.begin()
    store = Store(address, QUICK)
    part = copy_cache(store, Folder(tmp_path / "part"))
    opened = open_cache(tmp_path / "part")
    assert part.windows == 2  # one a split
    assert not opened.complete
    assert not verify_cache(opened, full=True)
    whole = open_cache(tiny.path)
    n = len(opened["train"])
    np.testing.assert_array_equal(opened["train"].read("mlp_in"), whole["train"].read("mlp_in", stop=n))
    copy_cache(Folder(tiny.path), store)
    copy_cache(store, Folder(tmp_path / "part"))
    assert files(tmp_path / "part") == tiny.files()


def test_a_copy_that_was_killed_goes_on(make_cache: Make, proxy: Proxy, address: str, tmp_path: Path) -> None:
    """Every committed window of what is there can be read; the rest comes with the same command."""
    tiny = make_cache()
    copy_cache(Folder(tiny.path), Store(address, QUICK))
    back = tmp_path / "back"

    def hold(method: str, path: str, nth: int) -> str | None:
        return "slow" if "/train/mlp_in/c.2" in path else None

    proxy.begin(hold)
    command = [sys.executable, "-m", "clt.cli", "pull", address, str(back), "--threads", "2"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as running:
        while not any("/train/mlp_in/c.2" in request.path for request in list(proxy.requests)):
            assert running.poll() is None
        running.kill()
    assert len(open_cache(back)["train"].entries) == 2
    assert not [fault for fault in verify_cache(back, full=True) if "zarr.json" not in fault]
    proxy.begin()
    done = clt("pull", address, back, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kept"] > 40
    assert files(back) == tiny.files()


@pytest.mark.parametrize("secure", [False, True])
def test_a_web_server_is_a_source(
    secure: bool, make_cache: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder behind any, without a listing."""
    tiny, certificate = make_cache(), None
    if secure:
        certificate = write_certificate(tmp_path / "certificate.pem")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with web_server(tiny.path.parent, certificate) as address:
        copy_cache(Store(f"{address}/{tiny.path.name}", QUICK), Folder(tmp_path / "back"))
    assert files(tmp_path / "back") == tiny.files()


def test_a_hugging_face_dataset_is_a_source(
    make_cache: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files lie at /datasets/USER/NAME/resolve/REVISION/ and lead elsewhere; the token goes along."""
    from huggingface_hub import constants

    tiny, tokens = make_cache(), set()

    class Hub(FolderHandler):
        def send_head(self) -> object:
            prefix = "/datasets/someone/caches/resolve/v2/sub/"
            if self.path.startswith(prefix):
                tokens.add(self.headers.get("Authorization"))
                self.send_response(302)
                self.send_header("Location", "/cdn/" + self.path.removeprefix(prefix))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return None
            self.path = self.path.removeprefix("/cdn")
            return super().send_head()

    with web_server(tiny.path, handler=Hub) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setenv("HF_TOKEN", "hf_something")
        store = Store("hf://datasets/someone/caches@v2/sub", QUICK)
        copy_cache(store, Folder(tmp_path / "back"))
    assert files(tmp_path / "back") == tiny.files()
    assert tokens == {"Bearer hf_something"}


def test_a_snapshot_of_links_is_a_cache(make_cache: Make, tmp_path: Path) -> None:
    """As huggingface_hub keeps downloads: names that lead to blobs."""
    tiny, snapshot = make_cache(), tmp_path / "snapshot"
    (tmp_path / "blobs").mkdir()
    for number, (name, data) in enumerate(tiny.files().items()):
        blob = tmp_path / "blobs" / str(number)
        blob.write_bytes(data)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blob)
    assert not verify_cache(snapshot, full=True)
    copy_cache(Folder(snapshot), Folder(tmp_path / "copy"))
    assert files(tmp_path / "copy") == tiny.files()


def test_addresses() -> None:
    for text, expected in (
        ("s3://bucket/a/b/", "s3://bucket/a/b"),
        (Path("s3://bucket/a"), "s3://bucket/a"),
        ("hf://datasets/u/n@main/x", "hf://datasets/u/n@main/x"),
        ("https://host:80/x", "https://host:80/x"),
        ("folder/s3", None),
        (Path("/s3:/bucket"), None),
    ):
        assert remote_address(text) == expected


def refusal(address: str, monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    """What a pull of it says, where the environment has no credentials but these."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "GOOGLE_", "AZURE_", "HF_"))]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CacheError) as found:
        copy_cache(Store(address, QUICK), Folder(Path("nowhere")))
    return str(found.value)


def test_no_credentials_is_told_with_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client asks the machine's metadata service, here a port where nobody is."""
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setattr(faults, "METADATA_SERVICES", (nobody,))
    said = refusal("s3://b/c", monkeypatch, AWS_METADATA_ENDPOINT=nobody, AWS_ALLOW_HTTP="true")
    assert said.startswith("s3://b/c: expected credentials, found none in the environment")
    assert "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in said
    assert "set AZURE_STORAGE_ACCOUNT_NAME" in refusal("az://b/c", monkeypatch)


def test_a_bucket_elsewhere_and_one_that_is_not_there(
    make_cache: Make, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CacheError, match="there is no such bucket; create it, or check its name"):
        copy_cache(Folder(make_cache().path), Store("s3://nobucket/x", QUICK))
    with pytest.raises(CacheError, match=r"no object zarr\.json; expected a cache there, check the address"):
        copy_cache(Store("s3://nobucket/x", QUICK), Folder(Path("nowhere")))
    proxy.begin(lambda method, path, nth: ELSEWHERE)
    with pytest.raises(CacheError, match="lies in another region; set AWS_REGION"):
        copy_cache(Store("s3://nobucket/x", QUICK), Folder(Path("nowhere")))


@pytest.mark.parametrize("address", ["https://host/x", "hf://datasets/someone/caches"])
def test_what_can_only_be_read_is_not_pushed_to(address: str, make_cache: Make) -> None:
    with pytest.raises(CacheError, match="can be read only; expected s3://, gs:// or az:// to write to"):
        copy_cache(Folder(make_cache().path), Store(address, QUICK))


def test_info_reads_no_shard_and_verify_names_the_way(
    make_cache: Make, proxy: Proxy, address: str, tmp_path: Path
) -> None:
    """The same numbers as of the folder."""
    tiny = make_cache(world_size=2)
    copy_cache(Folder(tiny.path), Store(address, QUICK))
    proxy.begin()
    far, near = clt("info", address, "--json"), clt("info", tiny.path, "--json")
    assert far.returncode == 0, far.stderr
    assert json.loads(far.stdout) == json.loads(near.stdout)
    asked = [request.path for request in proxy.requests]
    assert not [path for path in asked if "/mlp_" in path and "/stats/" not in path]
    assert clt("info", address).stdout.startswith(f"{address}: complete")
    done = clt("verify", address)
    assert done.returncode == 2
    assert f"`clt pull {address} FOLDER`" in done.stderr
    assert done.stderr.count("\n") == 1


def test_wrong_arguments_are_one_line(make_cache: Make, tmp_path: Path) -> None:
    done = clt("push", make_cache().path, tmp_path / "x")
    assert done.returncode == 2
    assert "expected an address such as s3://bucket/folder" in done.stderr
    assert done.stderr.count("\n") == 1
