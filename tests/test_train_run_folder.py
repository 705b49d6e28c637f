"""A run's config.json: read as it was written, or refused in words."""

import json
from pathlib import Path
from typing import Any

import pytest

from clt.train.config import TrainConfig, TranscoderConfig
from clt.train.run_folder import begin_run, load_config


def write(folder: Path, data: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(data if isinstance(data, str) else json.dumps(data))
    return folder


def settings(folder: Path) -> TrainConfig:
    layers = TranscoderConfig(k=(1, 2), latents=8)
    return TrainConfig(caches=(Path("c"),), run=folder, transcoder=layers, keep_kind=(("image", 0.5),))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    config = settings(tmp_path / "run")
    assert begin_run(config, resume=False) is False
    assert load_config(config.run) == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda data: data.pop("seed"), r"another version of clt: missing \['seed'\], unknown \[\]; use the"),
        (lambda data: data.update(sead=1), r"missing \[\], unknown \['sead'\]"),
        (lambda data: data["transcoder"].pop("tie"), r"missing \['transcoder.tie'\]"),
    ],
)
def test_settings_of_another_version_are_named(tmp_path: Path, change: Any, words: str) -> None:
    """For reading and for resuming alike."""
    config = settings(tmp_path)
    data = config.to_json()
    change(data)
    write(tmp_path, data)
    with pytest.raises(ValueError, match=words):
        load_config(tmp_path)
    with pytest.raises(ValueError, match=words):
        begin_run(config, resume=True)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"transcoder": 3}', "\x00"])
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"config.json: expected the settings of a run, found none"):
        load_config(write(tmp_path, text))
