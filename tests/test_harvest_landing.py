"""Activations on their way to the host: quantised where they are or not, the cache is the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import clt.harvest.landing
import clt.harvest.run
from clt.cache_format import open_cache, verify_cache
from clt.cache_format.compiled import COMPILED
from clt.cache_format.layout import SITES
from clt.cache_format.window import StoredVectors
from clt.harvest.config import HarvestConfig
from clt.harvest.landing import AS_THEY_ARE, BERTHS, Form, Landing
from clt.harvest.run import harvest
from clt.stopwatch import Stopwatch

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("landing")
    tiny.save_llava(root / "model")
    tiny.write_dataset(root / "data")
    return root


QUANTISED, ROUNDED = Form(8.0, False), Form(None, True)


@pytest.mark.parametrize(
    ("precision", "form", "compiled"),
    [
        ("int8", Form(8.0, False), False),
        ("int8", Form(8.0, False), COMPILED),
        ("bf16", Form(None, True), False),
    ],
    ids=["int8", "int8 on the host", "bf16"],
)
def test_what_a_device_would_do_gives_the_same_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, form: Form, compiled: bool
) -> None:
    """Every byte of every file, but for the last digits of two statistics."""

    def config(name: str) -> HarvestConfig:
        return HarvestConfig(
            model=str(folder / "model"),
            dataset=str(folder / "data" / "train.jsonl"),
            cache=tmp_path / name,
            window=64,
            val_fraction=0.3,
            precision=precision,
            exclude=("bos",),
        )

    monkeypatch.setattr(clt.harvest.run, "choose_form", lambda manifest, device: AS_THEY_ARE)
    harvest(config("host"))
    monkeypatch.setattr(clt.harvest.landing, "COMPILED", compiled)
    monkeypatch.setattr(clt.harvest.run, "choose_form", lambda manifest, device: form)
    harvest(config("device"))
    assert verify_cache(str(tmp_path / "device"), full=True) == []
    host = [path for path in (tmp_path / "host").rglob("c.*") if "stats" not in path.parts]
    assert len(host) > 20
    for path in host:
        assert path.read_bytes() == (tmp_path / "device" / path.relative_to(tmp_path / "host")).read_bytes()
    ours, theirs = (open_cache(tmp_path / name)["train"] for name in ("device", "host"))
    for site in SITES:
        mine, other = ours.statistics(site), theirs.statistics(site)
        for name in ("mean", "variance", "rms", "absmax", "noise_fvu"):
            np.testing.assert_allclose(getattr(mine, name), getattr(other, name), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [AS_THEY_ARE, ROUNDED, QUANTISED])
@pytest.mark.parametrize("all_kept", [True, False])
def test_chosen_rows_land_in_order_in_memory_that_is_used_again(
    dtype: torch.dtype, form: Form, all_kept: bool
) -> None:
    """Three batches, each larger or smaller than the one before, in each form."""
    landing = Landing(2, form, CPU, Stopwatch())
    generator = torch.Generator().manual_seed(0)
    for tokens in (10, 30, 20, 30):
        values = {
            (site, layer): torch.randn(2, tokens, 80, generator=generator).to(dtype)
            for site in SITES
            for layer in range(2)
        }
        keep = torch.ones(2, tokens, dtype=torch.bool)
        if not all_kept:
            keep = torch.rand(2, tokens, generator=generator) > 0.4
        landing.begin(keep)
        for (site, layer), value in values.items():
            given = value.clone()
            landing.put(site, layer, given if layer else given.flatten(0, 1))
            given.fill_(7)  # the model goes on in place
        landed = landing.finish()
        for site, found in landed.values().items():
            for layer in range(2):
                wanted = values[site, layer][keep].float().numpy()
                check(found, layer, wanted)
        landed.release()


def check(found: Any, layer: int, wanted: np.ndarray) -> None:
    if isinstance(found, StoredVectors):
        step = np.repeat(found.scale[:, layer].astype(np.float32), 64, axis=1)[:, :80]
        assert (np.abs(found.codes[:, layer] * step - wanted) <= 0.501 * step).all()
    elif found.dtype == np.uint16:
        bits = torch.from_numpy(wanted).to(torch.bfloat16).view(torch.uint16).numpy()
        assert np.array_equal(found[:, layer], bits)
    else:
        assert np.array_equal(found[:, layer], wanted)


def test_memory_is_bounded_by_its_berths() -> None:
    """As many batches as there are berths fly at once, in memory of their own; then it is used again."""
    landing = Landing(1, AS_THEY_ARE, CPU, Stopwatch())
    flying = []
    for number in range(BERTHS):
        landing.begin(torch.ones(1, 4, dtype=torch.bool))
        landing.put("mlp_in", 0, torch.full((1, 4, 8), float(number)))
        flying.append(landing.finish())
    assert [landed.values()["mlp_in"].max() for landed in flying] == [0.0, 1.0, 2.0]
    place = flying[1].values()["mlp_in"].ctypes.data
    flying[1].release()
    landing.begin(torch.ones(1, 4, dtype=torch.bool))
    landing.put("mlp_in", 0, torch.full((1, 4, 8), 9.0))
    assert landing.finish().values()["mlp_in"].ctypes.data == place
