"""A run folder with random weights, as `clt train` leaves one."""

from collections.abc import Callable
from pathlib import Path

import torch
from tiny_transcoder import make_model

from clt.train.checkpoint import TrainerState, save_checkpoint
from clt.train.optimizer import Optimizer
from clt.train.origin import save_origin
from clt.train.shape import Shape
from clt.train.transcoder import CrossLayerTranscoder

Change = Callable[[CrossLayerTranscoder], None]
SOURCE = {"model": "maker/tiny-llava", "mlps": "model.language_model.layers.{}.mlp", "input_site": "mlp_in"}


def save_run(
    run: Path, shape: Shape, dtype: torch.dtype = torch.float32, change: Change = lambda model: None
) -> CrossLayerTranscoder:
    """The transcoder that the run holds; change: what to do to it before."""
    model = make_model(shape).to(dtype)
    if shape.activation == "batchtopk":
        model.threshold.uniform_(0.1, 0.5)
    with torch.no_grad():
        change(model)
    optimizer = Optimizer(model, "adam", 0, None)
    since = torch.zeros(shape.n_layers, shape.n_latents, dtype=torch.int64)
    save_checkpoint(run, model, optimizer, TrainerState(1, 1, {}, since, {}), keep=1)
    save_origin(run, SOURCE, seed=0)
    return model
