"""A sweep's settings, from a TOML file: grids of them, and single runs.

    [grid]                 # every combination of the values that are in lists
    k = [16, 32]
    lr = [1e-4, 3e-4]

    [[run]]                # one run; any number of these, and of [[grid]]
    name = "jump"
    activation = "jumprelu"
    sparsity_coeff = 1e-3

What a run does not set is the command line's. Imports nothing heavy.
"""

import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from itertools import product
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, get_args, get_type_hints

from .config import TrainConfig, TranscoderConfig, config_of

SWEPT = (
    *(field.name for field in fields(TranscoderConfig)),
    *("seed", "optimizer", "lr", "lr_warmup_steps", "lr_schedule", "max_grad_norm", "dtype", "finetune"),
    *("loss_fn", "fvu_variance", "sparsity_coeff", "auxk_alpha", "dead_latent_penalty", "k_anneal_steps"),
)
"""Options that the runs of a sweep may have different values of."""
READING = (
    *("caches", "layers", "kinds", "exclude", "exclude_token_ids", "keep_kind", "order", "order_seed"),
    *("batch_tokens", "grad_acc_steps", "epochs", "steps", "tokens", "buffer_tokens", "io", "threads"),
    *("shuffle_windows", "stage_dir", "stage_gb"),
)
"""Options that decide which tokens a step holds, or how they are read."""
TYPES = get_type_hints(TranscoderConfig) | get_type_hints(TrainConfig)
LONGEST_LABEL = 150
"""Bytes; file systems take 255, and checkpoints and temporary files are named after it."""
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=,+-]*")


class Entry(NamedTuple):
    """One run of a sweep."""

    label: str
    """Its folder's name: given, or made of the settings that differ between runs."""
    settings: dict[str, Any]


def read_sweep(path: Path) -> list[Entry]:
    """The runs that a file asks for, in its order; ValueError says what is wrong where."""
    if not path.is_file():
        raise ValueError(f"--sweep {path}: expected a TOML file of settings, found no such file")
    try:
        data = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as fault:
        raise ValueError(f"{path}: expected TOML, found: {fault}") from None
    if unknown := sorted(data.keys() - {"grid", "run"}):
        raise ValueError(f"{path}: expected tables [grid] and [[run]], found {', '.join(unknown)}")
    named: list[tuple[object, dict[str, Any]]] = []
    for number, table in enumerate(_tables(data, "grid", path), start=1):
        named += [(None, settings) for settings in _combinations(table, f"{path}, grid {number}")]
    for number, table in enumerate(_tables(data, "run", path), start=1):
        settings = {name: value for name, value in table.items() if name != "name"}
        named.append((table.get("name"), _parse_settings(settings, f"{path}, run {number}")))
    if not named:
        raise ValueError(f"{path}: expected a table [grid] or [[run]] with settings, found none")
    return _labelled(named, path)


def sweep_configs(options: dict[str, Any], entries: list[Entry], folder: Path) -> list[TrainConfig]:
    """One config a run, each in a folder of its own; options: the command line's, by name.

    The order of reading is seeded by the command line's seed in all of them, and written down in each, so
    that the run's own config.json repeats it alone.
    """
    order_seed = options["seed"] if options["order_seed"] is None else options["order_seed"]
    configs = []
    for entry in entries:
        own = {"order_seed": order_seed, "run": folder / entry.label}
        try:
            configs.append(config_of({**options, **entry.settings, **own}))
        except ValueError as fault:
            raise ValueError(f"run {entry.label} of the sweep: {fault}") from None
    return configs


def _tables(data: dict[str, Any], name: str, path: Path) -> list[dict[str, Any]]:
    """`[name]`, or any number of `[[name]]`."""
    found = data.get(name, [])
    tables = found if isinstance(found, list) else [found]
    if not all(isinstance(table, dict) for table in tables):
        raise ValueError(
            f"{path}: expected [{name}] or [[{name}]] to be a table of settings, found {found!r}"
        )
    return tables


def _combinations(table: dict[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """The last setting changes fastest. A value that is no list is that of all runs of the grid."""
    choices = {name: value if isinstance(value, list) else [value] for name, value in table.items()}
    if empty := [name for name, values in choices.items() if not values]:
        raise ValueError(f"{where}: {empty[0]}: expected one value or more, found an empty list")
    for values in product(*choices.values()):
        yield _parse_settings(dict(zip(choices, values, strict=True)), where)


def _parse_settings(table: dict[str, Any], where: str) -> dict[str, Any]:
    """Names and types checked; `n-targets` is `n_targets`."""
    settings = {}
    for given, value in table.items():
        name = given.replace("-", "_")
        if name in READING:
            raise ValueError(
                f"{where}: {given} belongs on the command line, because all runs of a sweep share one read "
                f"of the cache, step by step; for several values run `clt train --sweep` for each"
            )
        if name not in SWEPT:
            known = name in TYPES
            reason = "belongs on the command line, for all runs" if known else "is no option of clt train"
            raise ValueError(f"{where}: {given} {reason}; expected some of {', '.join(SWEPT)}")
        settings[name] = _parse_value(value, TYPES[name], f"{where}: {given}")
    return settings


def _parse_value(value: object, hint: Any, where: str) -> Any:
    """A TOML value as the option's type has it."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if isinstance(value, list):
        if tuple[int, ...] in kinds and value and all(type(item) is int for item in value):
            return tuple(value)
    elif type(value) in kinds:
        return value
    elif type(value) is int and float in kinds:
        return float(value)
    elif isinstance(value, str) and Path in kinds:
        return Path(value)
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path"}
    wanted = " or ".join(
        names.get(kind, "a list of whole numbers") for kind in kinds if kind is not type(None)
    )
    raise ValueError(f"{where}: expected {wanted}, found {value!r}")


def _labelled(named: list[tuple[object, dict[str, Any]]], path: Path) -> list[Entry]:
    every = list(dict.fromkeys(name for _, settings in named for name in settings))
    missing = object()
    varying = [
        name for name in every if len({repr(settings.get(name, missing)) for _, settings in named}) > 1
    ] or every
    entries: dict[str, Entry] = {}
    for name, settings in named:
        label = str(name or "") or ",".join(
            f"{key}={_text(settings[key])}" for key in varying if key in settings
        )
        label = label or "plain"
        if not _LABEL.fullmatch(label) or len(label) > LONGEST_LABEL:
            raise ValueError(
                f"{path}: a run's name becomes a folder: expected letters, digits and ._=,+- only, at most "
                f"{LONGEST_LABEL}, found {label!r}; give each [[run]] a name"
            )
        if label in entries:
            raise ValueError(f"{path}: two runs are {label!r}; leave one out, or give it another name")
        entries[label] = Entry(label, settings)
    return list(entries.values())


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return value.name if isinstance(value, Path) else str(value)
