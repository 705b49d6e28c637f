"""How a model is loaded: once, in the numbers and places asked for, running no code that came with it."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_families
import torch
import transformers.modeling_utils
from safetensors import safe_open

from clt.cache_format import CacheError, open_cache
from clt.harvest import model as loading
from clt.harvest.config import HarvestConfig
from clt.harvest.mlps import find_hookpoints
from clt.harvest.model import load_model, load_processor
from clt.harvest.run import harvest


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama in `model`, texts in `texts`."""
    root = tmp_path_factory.mktemp("loading")
    tiny.save_llama(root / "model")
    tiny.write_rows(root / "texts", [{"text": "a red circle on a blue background " * n} for n in (1, 4, 2)])
    return root


def config_for(folder: Path, cache: Path, **more: Any) -> HarvestConfig:
    settings = {
        "model": str(folder / "model"),
        "window": 64,
        "val_fraction": 0.0,
        "precision": "bf16",
        **more,
    }
    return HarvestConfig(dataset=str(folder / "texts" / "train.jsonl"), cache=cache, **settings)


def test_each_weight_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file's own reader counts; nothing is loaded to be thrown away, or to be hashed."""
    reads: Counter[str] = Counter()

    class Counting:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._file = safe_open(*args, **kwargs)

        def __enter__(self) -> "Counting":
            self._file.__enter__()
            return self

        def __exit__(self, *args: Any) -> None:
            self._file.__exit__(*args)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def get_slice(self, name: str) -> Any:
            reads[name] += 1
            return self._file.get_slice(name)

        get_tensor = get_slice

    monkeypatch.setattr(transformers.modeling_utils, "safe_open", Counting)
    load_model(config_for(folder, Path("c")))
    with safe_open(folder / "model" / "model.safetensors", "pt") as file:
        assert reads == dict.fromkeys(file.keys(), 1)


def test_a_device_map_gives_the_same_cache(folder: Path, tmp_path: Path) -> None:
    plain = harvest(config_for(folder, tmp_path / "plain"))
    spread = harvest(config_for(folder, tmp_path / "spread", device_map="auto"))
    assert plain.tokens == spread.tokens
    values = [
        open_cache(tmp_path / name)["train"].read("mlp_out", start=0, stop=60) for name in ("plain", "spread")
    ]
    assert np.array_equal(*values)
    with pytest.raises(ValueError, match="--device-map: expected no --device beside it"):
        config_for(folder, tmp_path, device_map="auto", device="cpu")


@pytest.mark.parametrize(("more", "field"), [({"attn": "eager"}, "attn"), ({"dtype": "bfloat16"}, "dtype")])
def test_what_changes_the_numbers_belongs_to_the_caches_identity(
    folder: Path, tmp_path: Path, more: dict[str, str], field: str
) -> None:
    harvest(config_for(folder, tmp_path / "c", attn="sdpa"))
    with pytest.raises((CacheError, ValueError), match=f"{field}"):
        harvest(config_for(folder, tmp_path / "c", **{"attn": "sdpa", **more}))


def test_quantised_loading_wants_its_package(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError,
        match=r"^--load-in 8bit: expected bitsandbytes, found none; pip install 'clt-cache\[quantised\]'",
    ):
        load_model(config_for(folder, Path("c"), load_in="8bit"))
    with pytest.raises(
        ValueError,
        match=r"^--device-map auto: expected accelerate, found none; pip install 'clt-cache\[harvest\]'",
    ):
        load_model(config_for(folder, Path("c"), device_map="auto"))
    with pytest.raises(ValueError, match="--load-in: expected one of 8bit, 4bit, found '3bit'"):
        config_for(folder, Path("c"), load_in="3bit")


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_rounded_weights_are_harvested(
    load_in: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes has kernels for a CPU; its 4-bit ones want widths of 64 and its multiples."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(tiny_families, "WIDTH", 128)
    monkeypatch.setitem(
        tiny_families.TEXT,
        "llama",
        lambda size: tiny_families.text_config("Llama", size, intermediate_size=128),
    )
    tiny_families.save_text("llama", tmp_path / "model")
    config = config_for(folder, tmp_path / "c", model=str(tmp_path / "model"), load_in=load_in)
    model = load_model(config)
    kind = {"8bit": bitsandbytes.nn.Linear8bitLt, "4bit": bitsandbytes.nn.Linear4bit}[load_in]
    paths = find_hookpoints(model, None, "mlp_in").mlps
    assert all(isinstance(model.body.get_submodule(path).up_proj, kind) for path in paths)
    harvest(config)
    cache = open_cache(tmp_path / "c")
    assert cache.manifest.source["load_in"] == load_in
    x, y = (torch.from_numpy(cache["train"].read(site, start=0, stop=64)) for site in ("mlp_in", "mlp_out"))
    with torch.inference_mode():
        for layer, path in enumerate(paths):
            told = model.body.get_submodule(path)(x[None, :, layer])[0]
            torch.testing.assert_close(
                told, y[:, layer], rtol=0.05, atol=0.05 * float(y[:, layer].abs().max())
            )


def test_code_that_comes_with_a_model_does_not_run(folder: Path, tmp_path: Path) -> None:
    """By default; the message names the option that would let it."""
    model = tiny.save_llama(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "code.StrangerConfig"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match=r"code of its own; .* --trust-remote-code") as fault:
        load_processor(config_for(folder, Path("c"), model=str(model)))
    assert "\n" not in str(fault.value)
    assert not (tmp_path / "ran").exists()


def test_a_processor_that_wants_a_package_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolVLM's wants one to spell the numbers of videos."""
    model = tiny_families.save_vision("smolvlm", tmp_path / "model")
    monkeypatch.setattr("transformers.models.smolvlm.processing_smolvlm.num2words", None)
    with pytest.raises(ValueError, match=r"Package `num2words` is required .* `pip install num2words`"):
        load_processor(HarvestConfig(model=str(model), dataset="", cache=tmp_path / "c"))


def test_a_folder_as_the_hub_has_it_is_read_without_torchvision(tmp_path: Path) -> None:
    """With settings for videos beside those for pictures, in files of their own and in the processor's."""
    model = tiny_families.save_vision("qwen2_vl", tmp_path / "model")
    settings = json.loads((model / "processor_config.json").read_text())
    videos = {"video_processor_type": "Qwen2VLVideoProcessor", "patch_size": 4}
    settings["video_processor"] = videos
    (model / "processor_config.json").write_text(json.dumps(settings))
    (model / "video_preprocessor_config.json").write_text(json.dumps(videos))
    processor = load_processor(HarvestConfig(model=str(model), dataset="", cache=tmp_path / "c")).processor
    assert type(processor).__name__ == "Qwen2VLProcessor"
    assert processor.image_processor.patch_size == 4
