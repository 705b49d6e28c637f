"""az:// against Microsoft's own emulator, where it is installed: `npm install -g azurite`."""

import base64
import hashlib
import hmac
import shutil
import subprocess
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.client import HTTPConnection
from pathlib import Path

import pytest
import torch
from object_store import QUICK, free_port
from planted import write_planted
from test_remote_copying import files
from test_remote_training import config, weights

from clt.remote import store
from clt.remote.copying import Folder, copy_cache
from clt.train.loop import train

ACCOUNT = "devstoreaccount1"
KEY = base64.b64encode(b"the key of nothing").decode()


@pytest.fixture
def container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """An empty one, by its address."""
    if (program := shutil.which("azurite-blob")) is None:
        pytest.skip("azurite is not installed (npm install -g azurite)")
    port = free_port()
    monkeypatch.setenv("AZURITE_ACCOUNTS", f"{ACCOUNT}:{KEY}")
    command = [
        program,
        "--silent",
        "--disableTelemetry",
        "--skipApiVersionCheck",
        "--inMemoryPersistence",
        "--blobPort",
        str(port),
    ]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as server:
        try:
            until = time.monotonic() + 60
            while not create_container(port):
                assert time.monotonic() < until
                time.sleep(0.2)
            monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", ACCOUNT)
            monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", KEY)
            monkeypatch.setenv("AZURE_ENDPOINT", f"http://127.0.0.1:{port}/{ACCOUNT}")
            monkeypatch.setenv("AZURE_ALLOW_HTTP", "true")
            yield "az://box"
        finally:
            server.kill()


def create_container(port: int) -> bool:
    """Whether it is there; signed with the account's key."""
    date, version = formatdate(usegmt=True), "2021-08-06"
    said = "PUT" + 12 * "\n" + f"x-ms-date:{date}\nx-ms-version:{version}\n"
    said += f"/{ACCOUNT}/{ACCOUNT}/box\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), said.encode(), hashlib.sha256).digest()
    headers = {"x-ms-date": date, "x-ms-version": version, "Content-Length": "0"}
    headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}"
    connection = HTTPConnection("127.0.0.1", port)
    try:
        connection.request("PUT", f"/{ACCOUNT}/box?restype=container", headers=headers)
        with connection.getresponse() as answer:
            return answer.status == 201
    except OSError:
        return False
    finally:
        connection.close()


@pytest.mark.slow
def test_there_and_back_and_trained_from(
    container: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.Store.__init__, "__defaults__", (QUICK,))
    local, address = write_planted(tmp_path / "local", 2048, val=100), f"{container}/planted"
    copy_cache(Folder(local), store.Store(address))
    assert copy_cache(Folder(local), store.Store(address)).files == 0
    copy_cache(store.Store(address), Folder(tmp_path / "back"))
    assert files(tmp_path / "back") == files(local)
    train(config(Path(address), tmp_path / "far", stage_dir=tmp_path / "stage"))
    train(config(local, tmp_path / "near"))
    for name, tensor in weights(tmp_path / "near").items():
        assert torch.equal(tensor, weights(tmp_path / "far")[name]), name
