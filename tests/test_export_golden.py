"""The bytes of an export: whoever reads one of last year's reads one of today's."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_run import save_run
from tiny_transcoder import SHAPE

from clt.export.run import export_run
from clt.train.shape import Shape
from clt.train.transcoder import CrossLayerTranscoder

GOLDEN = json.loads((Path(__file__).parent / "golden" / "exports.json").read_text())
CROSS = replace(SHAPE, layers=(0, 1, 2, 3), activation="jumprelu", k=None, bandwidth=2.0)
SHAPES = {"sparsify": replace(SHAPE, layers=(0, 1, 2, 3), n_targets=1)}


def plain(model: CrossLayerTranscoder) -> None:
    """Small multiples of 1/64 everywhere: every sum and product is exact, on any machine."""
    for number, tensor in enumerate(model.state_dict().values()):
        count = torch.arange(tensor.numel()).view(tensor.shape)
        tensor.copy_((count * 37 + 11 * number) % 61 / 64 - 0.5)
    for site in (model.inputs, model.outputs):
        site.scale.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    for log_threshold in model.log_threshold:
        log_threshold.data.zero_()


@pytest.mark.parametrize("name", ["circuit-tracer", "sae-lens", "sparsify", "clt-training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_has_the_bytes_it_always_had(tmp_path: Path, name: str, dtype: str) -> None:
    shape: Shape = SHAPES.get(name, CROSS)
    save_run(tmp_path / "run", shape, change=plain)
    export_run(tmp_path / "run", tmp_path / "out", name, dtype)
    files = sorted(path for path in (tmp_path / "out").rglob("*") if path.is_file())
    found = {
        path.relative_to(tmp_path / "out").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
    assert found == GOLDEN[f"{name} {dtype}"]
