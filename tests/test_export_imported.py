"""What was exported comes back: the same weights, the same outputs, and exported again the same bytes."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_export_formats import ALONE, BATCH, CROSS, JUMPS, TOPK, assert_close
from tiny_run import save_run

from clt.export.imported import import_run
from clt.export.run import export_run
from clt.train.checkpoint import load_transcoder
from clt.train.run_folder import load_config
from clt.train.shape import Shape

ROUND = [
    ("circuit-tracer", CROSS),
    ("circuit-tracer", JUMPS),
    ("circuit-tracer", BATCH),
    ("circuit-tracer", replace(JUMPS, n_targets=4)),
    ("circuit-tracer", replace(ALONE, activation="jumprelu", bandwidth=2.0)),
    ("circuit-tracer", replace(ALONE, skip=False)),
    ("clt-training", CROSS),
    ("clt-training", TOPK),
    ("clt-training", JUMPS),
    ("clt-training", BATCH),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "shape"), ROUND)
def test_round_trip(tmp_path: Path, name: str, shape: Shape, dtype: str) -> None:
    """Every byte of the weights comes back."""
    model = save_run(tmp_path / "run", shape)
    export_run(tmp_path / "run", tmp_path / "out", name, dtype)
    import_run(tmp_path / "out", tmp_path / "back", name, model="maker/tiny-llava")
    back = load_transcoder(tmp_path / "back")
    assert (back.shape.layers, back.shape.n_targets) == (shape.layers, shape.n_targets)
    x = 2 * torch.randn(50, shape.n_layers, shape.d_model)
    if dtype == "float32":
        assert_close(back(x).detach(), model(x).detach())
    assert load_config(tmp_path / "back").transcoder.latents == shape.n_latents
    export_run(tmp_path / "back", tmp_path / "again", name, dtype)
    for path in (tmp_path / "out").rglob("*.safetensors"):
        again = tmp_path / "again" / path.relative_to(tmp_path / "out")
        assert path.read_bytes() == again.read_bytes(), path.name


def test_what_is_not_understood_is_refused(tmp_path: Path) -> None:
    save_run(tmp_path / "run", TOPK)
    export_run(tmp_path / "run", tmp_path / "out", "clt-training")
    path = tmp_path / "out" / "layers.1.mlp" / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "normalize_io": True}))
    cases = [
        ("clt-training", "out", "expected normalize_io False, found True"),
        ("circuit-tracer", "out", "config.yaml"),
        ("clt-training", "nowhere", "expected a folder"),
        ("pickle", "out", "expected one of circuit-tracer"),
    ]
    for name, folder, words in cases:
        with pytest.raises(ValueError, match=words):
            import_run(tmp_path / folder, tmp_path / "back", name)
    assert not (tmp_path / "back").exists()
    assert not list(tmp_path.glob(".*"))
