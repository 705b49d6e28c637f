"""What `clt features` is told."""

from dataclasses import dataclass, field
from pathlib import Path

from .latents import Sizes


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """What `clt features` is told."""

    run: Path
    """Run folder, or one checkpoint in it"""
    out: Path
    """Folder of the pages"""
    caches: tuple[Path, ...] = ()
    """None: the run's own"""
    split: str = "train"
    dataset: str | None = None
    """Where the dataset lies now; None: where it lay"""
    model: str | None = None
    """Its unembedding gives promoted and suppressed tokens"""
    sizes: Sizes = field(default_factory=Sizes)
    quantiles: int = 10
    """Examples of each latent at evenly spaced quantiles of its activations"""
    similar: int = 8
    batch_tokens: int = 4096
    threads: int | None = None
    device: str | None = None
    save_seconds: float = 60.0

    def __post_init__(self) -> None:
        counts = {"top": self.sizes.top, "quantiles": self.quantiles, "batch-tokens": self.batch_tokens}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"--{name}: expected at least 1, found {count}")
