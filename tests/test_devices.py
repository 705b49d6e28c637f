"""Devices by name."""

import pytest
import torch

from clt.devices import find_device


def test_each_process_of_a_machine_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device(None).type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("torch.empty", lambda *size, device: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name in (None, "cuda"):
        assert find_device(name) == torch.device("cuda:0")
    for local, device in (("1", "cuda:1"), ("3", "cuda:3"), ("5", "cuda:1")):
        monkeypatch.setenv("LOCAL_RANK", local)
        assert find_device("cuda") == torch.device(device)
        assert find_device("cuda:2") == torch.device("cuda:2")


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "", "xla", "cuda:x"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"--device: expected a device that is here.*found '{name}'"):
        find_device(name)
