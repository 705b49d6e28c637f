"""Finding the MLPs of the language model, and the norms in front of them.

An MLP here is what a block adds to the residual stream beside its attention, as one module: of a mixture of
experts the router and all experts together.
"""

import re
from typing import NamedTuple

from torch import nn

from .model import LoadedModel

MLP_NAMES = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "moe")
NORM_NAMES = (
    *("pre_feedforward_layernorm", "post_attention_layernorm", "ln_2", "norm_2", "ffn_norm"),
    *("ln_mlp", "input_layernorm", "ln_1"),
)
"""Norms whose output the MLP reads, most specific first; the last three where attention and MLP read the same
residual stream. Which one it is gets checked in each forward pass."""
MOST_SHOWN = 12


class Hookpoints(NamedTuple):
    """Paths, inside the body, of the modules to listen to; index = layer."""

    mlps: list[str]
    norms: list[str] | None
    """Set for input site resid_mid."""


def find_hookpoints(model: LoadedModel, pattern: str | None, input_site: str) -> Hookpoints:
    """The MLPs of the language model in layer order; ValueError lists candidates where none fit."""
    modules = dict(model.body.named_modules())
    mlps = _find_mlps(model, modules) if pattern is None else _named_mlps(model, modules, pattern)
    return Hookpoints(mlps, _find_norms(modules, mlps) if input_site == "resid_mid" else None)


def path_pattern(paths: list[str]) -> str:
    """One path for all layers, {} where the layer's number stands."""
    return re.sub(r"(?<![^.])0(?![^.])", "{}", paths[0], count=1)


def _named_mlps(model: LoadedModel, modules: dict[str, nn.Module], pattern: str) -> list[str]:
    """pattern: a path inside the body or inside the whole model, with {} for the layer."""
    if "{}" not in pattern:
        raise ValueError(f"--mlp {pattern!r}: expected {{}} where the layer's number stands")
    whole = dict(model.whole.named_modules())
    named = [pattern.replace("{}", str(layer)) for layer in range(model.n_layers)]
    inside = {id(module): path for path, module in modules.items()}
    found = [whole[path] if path in whole else modules.get(path) for path in named]
    if missing := [path for path, module in zip(named, found, strict=True) if id(module) not in inside]:
        raise ValueError(
            f"--mlp {pattern!r}: the model has no module {missing[0]}; "
            f"candidates: {_candidates(model, modules)}"
        )
    return [inside[id(module)] for module in found]


def _find_mlps(model: LoadedModel, modules: dict[str, nn.Module]) -> list[str]:
    """Look for a list of n_layers blocks with an MLP each, in the language model."""
    inside = {id(module) for module in _language_model(model).modules()}
    for path, module in modules.items():
        if not isinstance(module, nn.ModuleList) or len(module) != model.n_layers or id(module) not in inside:
            continue
        for name in MLP_NAMES:
            if all(isinstance(getattr(block, name, None), nn.Module) for block in module):
                return [f"{path}.{layer}.{name}" for layer in range(len(module))]
    raise ValueError(
        f"{model.name}: found no {model.n_layers} MLPs named one of {', '.join(MLP_NAMES)}; "
        f"name them with --mlp, candidates: {_candidates(model, modules)}"
    )


def _language_model(model: LoadedModel) -> nn.Module:
    """What transformers calls the decoder: for a model that sees, the body without its vision tower."""
    decoder = model.whole.get_decoder()
    return decoder if isinstance(decoder, nn.Module) else model.body


def _find_norms(modules: dict[str, nn.Module], mlps: list[str]) -> list[str]:
    parents = [path.rpartition(".")[0] for path in mlps]
    name = next((n for n in NORM_NAMES if all(f"{parent}.{n}" in modules for parent in parents)), None)
    if name is None:
        children = ", ".join(name for name, _ in modules[parents[0]].named_children())
        raise ValueError(
            f"--input-site resid_mid: expected a norm named one of {', '.join(NORM_NAMES)} in {parents[0]}, "
            f"found {children}; harvest --input-site mlp_in"
        )
    return [f"{parent}.{name}" for parent in parents]


def _candidates(model: LoadedModel, modules: dict[str, nn.Module]) -> str:
    """Paths, {} for the layer, of what has weights and is in each block of some list of n_layers blocks."""
    found: list[str] = []
    for path, module in modules.items():
        if isinstance(module, nn.ModuleList) and len(module) == model.n_layers:
            first, *others = ({name for name, _ in block.named_modules() if name} for block in module)
            everywhere = first.intersection(*others)
            holding = [name for name, child in module[0].named_modules() if list(child.parameters())]
            found += [f"{path}.{{}}.{name}" for name in holding if name in everywhere]
    more = f" and {len(found) - MOST_SHOWN} more" if len(found) > MOST_SHOWN else ""
    return (", ".join(sorted(found, key=lambda path: path.count("."))[:MOST_SHOWN]) or "none") + more
