"""Start from another run's weights: what it has is kept, what is new starts fresh.

Layers are matched by their number in the model. A fresh decoder is zero, so that where decoders are not tied
the transcoder computes at first what the run's does.
"""

from pathlib import Path

import torch

from .checkpoint import checkpoint_folder, layer_tensors, load_shape, load_transcoder
from .shape import Shape
from .transcoder import CrossLayerTranscoder


@torch.no_grad()
def start_from(model: CrossLayerTranscoder, run: Path) -> list[str]:
    """Copy the run's weights into a fresh model; what the user should know of it, a sentence each.

    Layers of the run keep its means and scales, which its weights belong to. ValueError where the model has
    no place for something that the run has.
    """
    shape = load_shape(checkpoint_folder(run))
    _require_place(shape, model.shape, run)
    places = [model.shape.layers.index(layer) for layer in shape.layers]
    mine_there = [there for there, here in enumerate(places) if here in model.own]
    old = load_transcoder(run, None if shape.tie == "source" else mine_there)
    other_statistics = False
    for there, here in enumerate(places):
        kept, mine = layer_tensors(old, there), layer_tensors(model, here)
        for name in (kept.keys() & mine.keys()) - {"W_dec"}:
            value = kept[name].to(mine[name])
            other_statistics |= name.endswith(("_mean", "_scale")) and not torch.equal(value, mine[name])
            mine[name].copy_(value)
    for source, target in _pairs(old.shape):
        layer, slot = model.shape.decoder_place(places[source], places[target])
        if layer not in model.decoder_layers:
            continue
        model.W_dec[layer][slot].copy_(old.decoder(source, target))
    return _notes(old.shape, model.shape, run, other_statistics)


def _pairs(shape: Shape) -> list[tuple[int, int]]:
    """(source, target), by place."""
    return [(source, target) for target in range(shape.n_layers) for source in shape.sources(target)]


def _layer_pairs(shape: Shape) -> set[tuple[int, int]]:
    """(source, target), by number in the model."""
    return {(shape.layers[source], shape.layers[target]) for source, target in _pairs(shape)}


def _require_place(old: Shape, new: Shape, run: Path) -> None:
    """Refuse what cannot be kept."""
    for name, option in (("d_model", None), ("n_latents", "--latents"), ("tie", "--tie")):
        there, here = getattr(old, name), getattr(new, name)
        if there != here:
            way_out = (
                f"set {option} {there}" if option else "finetune on a cache of the model it was trained for"
            )
            raise ValueError(f"--finetune {run}: expected its {name} {there}, found {here}; {way_out}")
    if old.skip and not new.skip:
        raise ValueError(f"--finetune {run} has a skip connection: add --skip-connection")
    if missing := sorted(set(old.layers) - set(new.layers)):
        raise ValueError(f"--finetune {run}: its layers {missing} are not among those to train; see --layers")
    if lost := sorted(_layer_pairs(old) - _layer_pairs(new)):
        source, target = lost[0]
        raise ValueError(
            f"--finetune {run}: its layer {source} writes to layer {target}, which --n-targets "
            f"{new.n_targets} does not reach among the layers to train; raise it"
        )


def _notes(old: Shape, new: Shape, run: Path, other_statistics: bool) -> list[str]:
    fresh_layers = sorted(set(new.layers) - set(old.layers))
    fresh_pairs = _layer_pairs(new) - _layer_pairs(old)
    notes = [f"weights of {run}; fresh: layers {fresh_layers or 'none'}, {len(fresh_pairs)} pairs of layers"]
    if other_statistics:
        notes.append(f"layers of {run} keep its means and scales, not those of this cache")
    through_kept = {
        "none": set(),
        "source": {(s, t) for s, t in fresh_pairs if s in old.layers and t in old.layers},
        "target": {(s, t) for s, t in fresh_pairs if t in old.layers},
    }[new.tie]
    if through_kept:
        notes.append(
            f"--tie {new.tie}: {len(through_kept)} fresh pairs of layers use decoders that were kept, so "
            f"the transcoder does not begin as that of {run}"
        )
    if old.activation != new.activation:
        lost = "; its thresholds are not kept" if old.activation == "jumprelu" else ""
        notes.append(f"activation is {new.activation}, and was {old.activation} in {run}{lost}")
    if old.k != new.k:
        notes.append(f"k is {new.k}, and was {old.k} in {run}")
    return notes
