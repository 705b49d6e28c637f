"""Which device this process is to use."""

import os

import torch


def find_device(name: str | None) -> torch.device:
    """By name, as --device has it; None: cuda where there is one, else cpu.

    Of several CUDA devices, "cuda" is this process's own: torchrun starts one for each device of a machine.
    Raises ValueError where there is no such device.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and torch.cuda.is_available():
        name = f"cuda:{int(os.environ.get('LOCAL_RANK', '0')) % torch.cuda.device_count()}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as fault:  # torch says it in all three
        reason = " ".join(str(fault).split())[:120]
        raise ValueError(
            f"--device: expected a device that is here, such as cpu or cuda:0, found {name!r} ({reason})"
        ) from None
    return device
