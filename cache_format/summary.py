"""What `clt info` says of a cache."""

from typing import Any

from .layout import SITES, SPLITS
from .reader import Cache


def summarise_cache(cache: Cache) -> dict[str, Any]:
    """The keys of `clt info --json`."""
    manifest = cache.manifest
    splits: dict[str, dict[str, Any]] = {
        name: {
            "tokens": len(cache[name]),
            "windows": len(cache[name].entries),
            "bytes": cache[name].bytes,
            "kinds": cache[name].counts(),
            "sinks": cache[name].n_sinks,
        }
        for name in SPLITS
    }
    tokens = sum(split["tokens"] for split in splits.values())
    stored = sum(split["bytes"] for split in splits.values())
    values = tokens * 2 * manifest.n_layers * manifest.d_model
    return {
        "format_version": manifest.format_version,
        "model": manifest.source.get("model"),
        "d_model": manifest.d_model,
        "layers": list(manifest.layers),
        "precision": manifest.precision,
        "complete": cache.complete,
        "splits": splits,
        "rejected": len(cache.rejected()),
        "bytes_per_token": stored / tokens if tokens else None,
        "bits_per_value": 8 * stored / values if tokens else None,
        "ratio_to_bf16": 2 * values / stored if tokens else None,
        "noise_fvu": {site: cache["train"].statistics(site).noise_fvu.tolist() for site in SITES},
        "source": manifest.source,
    }


def render_summary(summary: dict[str, Any], path: str) -> str:
    """The same for people."""
    layers = summary["layers"]
    lines = [
        f"{path}: {'complete' if summary['complete'] else 'not complete (run the harvest again to go on)'}",
        f"  model      {summary['model']}, {len(layers)} layers ({layers[0]}-{layers[-1]}), "
        f"d_model {summary['d_model']}",
        f"  dataset    {summary['source'].get('dataset')}, {summary['rejected']} samples rejected",
    ]
    for name, split in summary["splits"].items():
        kinds = ", ".join(f"{n} {kind}" for kind, n in split["kinds"].items() if n)
        lines.append(
            f"  {name:<10} {split['tokens']} tokens ({kinds or 'none'}; {split['sinks']} of them sinks) "
            f"in {split['windows']} windows, {split['bytes'] / 1e6:.1f} MB"
        )
    if summary["bits_per_value"] is not None:
        lines.append(
            f"  precision  {summary['precision']}: {summary['bits_per_value']:.2f} bits a value, "
            f"{summary['bytes_per_token'] / 1024:.1f} KiB a token, "
            f"{summary['ratio_to_bf16']:.2f} times smaller than bf16"
        )
        lines.append("  noise (FVU of the stored values)   layer: mlp_in, mlp_out")
        noise = summary["noise_fvu"]
        for layer, before, after in zip(layers, noise["mlp_in"], noise["mlp_out"], strict=True):
            lines.append(f"  {layer:>32}: {before:.2e}, {after:.2e}")
    return "\n".join(lines)
