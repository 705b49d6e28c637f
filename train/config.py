"""What a training run is told. Imports nothing heavy, so that `clt --help` stays quick."""

import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..remote.address import name_of

LOSS_FNS = ("fvu",)
FVU_VARIANCES = ("cache", "batch")
ACTIVATIONS = ("topk", "batchtopk", "groupmax", "relu", "jumprelu")
WITH_K = ("topk", "batchtopk", "groupmax")
DEFAULT_K = 32
DEFAULT_BANDWIDTH = 2.0
"""Of jumprelu, in standard units: epsilon of Anthropic's update of January 2025."""
TIES = ("none", "source", "target")
SCHEDULES = ("linear", "constant", "cosine")
IO = ("mmap", "pread")
ORDERS = ("shuffled", "sequential")
OFFLOADS = ("none", "host", "disk")
DTYPES = ("float32", "bfloat16", "float64")
KINDS = ("text", "image", "bos", "template")
EXCLUDABLE = (*KINDS, "sink")

ROOT_RULE = "/ sqrt(latents / 16384)"
DEFAULT_LR = {
    "adam": (2e-4, True, "Gao et al. 2024, arXiv 2406.04093"),
    "adam8": (2e-4, True, "Gao et al. 2024, arXiv 2406.04093"),
    "signum": (5e-3, True, "EleutherAI's sparsify"),
    "muon": (2e-3, False, "EleutherAI's sparsify"),
}
"""By optimiser: the rate, whether it shrinks with the root of the latents, and whose rule that is."""
OPTIMIZERS = tuple(DEFAULT_LR)
DEFAULT_WARMUP_STEPS = 1000
DEAD_AFTER_TOKENS = 10_000_000
AT_LEAST_ONE = (
    *("batch_tokens", "grad_acc_steps", "steps", "tokens", "dead_after_tokens"),
    *("save_every", "keep", "log_every", "buffer_tokens", "shuffle_windows"),
)
NOT_NEGATIVE = ("sparsity_coeff", "auxk_alpha", "dead_latent_penalty", "k_anneal_steps", "lr_warmup_steps")


@dataclass(frozen=True, kw_only=True)
class TranscoderConfig:
    """The transcoder's structure; sizes that depend on the cache are in `Shape`."""

    activation: str = "topk"
    """topk, batchtopk, groupmax, relu or jumprelu: see `activation`."""
    k: int | tuple[int, ...] | None = None
    """Latents that are active for each token and layer, or one number a layer; batchtopk: on average.
    None: 32, or nothing for relu and jumprelu, which have no k."""
    bandwidth: float | None = None
    """Of jumprelu: width of the rectangle around a threshold in which it has a gradient. None: 2.0."""
    expansion_factor: int = 2
    """Latents of a layer = this times d_model, unless `latents` is given."""
    latents: int | None = None
    """Latents of a layer."""
    n_targets: int = 16
    """Layers that a source writes to, its own included; 1 is a per-layer transcoder."""
    tie: str = "none"
    """none: a decoder for each (source, target); source: one a source, for all its targets; target: one a
    target, for all its sources."""
    skip_connection: bool = False
    """Add to each target a linear map of its own layer's input."""

    def __post_init__(self) -> None:
        _one_of("tie", self.tie, TIES)
        _one_of("activation", self.activation, ACTIVATIONS)
        if self.activation in WITH_K and self.k is None:
            object.__setattr__(self, "k", DEFAULT_K)
        if self.activation not in WITH_K and self.k is not None:
            raise ValueError(f"--k: {self.activation} has no k; leave it out and choose --sparsity-coeff")
        if self.activation == "jumprelu" and self.bandwidth is None:
            object.__setattr__(self, "bandwidth", DEFAULT_BANDWIDTH)
        if self.bandwidth is not None and (self.activation != "jumprelu" or self.bandwidth <= 0):
            raise ValueError(
                f"--bandwidth: expected more than 0, with --activation jumprelu, found {self.bandwidth}"
            )
        if any(k < 1 for k in self.every_k):
            raise ValueError(f"--k: expected at least 1, found {self.k}")
        for name in ("expansion_factor", "n_targets"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')}: expected at least 1, found {getattr(self, name)}"
                )
        if self.latents is not None and self.latents < max(self.every_k, default=1):
            raise ValueError(f"--latents: expected at least k = {self.k}, found {self.latents}")

    @property
    def every_k(self) -> tuple[int, ...]:
        """All k that are asked for."""
        if self.k is None:
            return ()
        return (self.k,) if isinstance(self.k, int) else self.k


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    caches: tuple[Path, ...]
    """Caches of one identity, read as one."""
    run: Path
    """Folder to write."""
    transcoder: TranscoderConfig
    layers: str | None = None
    """`0-31`, `0,4,8`, `0-31:4`; None: all in the cache."""
    finetune: Path | None = None
    """Run, or checkpoint, whose weights to start from."""
    loss_fn: str = "fvu"
    """Summed over targets: squared error over variance."""
    fvu_variance: str = "cache"
    """Variance that the loss is divided by: the cache's own, or the step's (as older trainers do)."""
    sparsity_coeff: float | None = None
    """Weight of the sparsity loss of relu and jumprelu, reached linearly over the whole run; see `losses`."""
    auxk_alpha: float = 0.0
    """Weight of AuxK, which lets dead latents rebuild the residual; 1/32 is usual."""
    dead_latent_penalty: float = 0.0
    """Weight of the loss that raises the pre-activations of dead latents; 3e-6 in the recipe."""
    dead_after_tokens: int | None = None
    """A latent that was not positive for so many tokens is dead; None: 10 million, or an epoch if less."""
    k_anneal_steps: int = 0
    """Optimiser steps in which k falls linearly from ten times its value."""
    batch_tokens: int = 4096
    """Tokens of a micro-batch."""
    grad_acc_steps: int = 1
    """Micro-batches of a step."""
    epochs: float = 1.0
    """Passes over the cache; the run ends at whichever of epochs, steps and tokens comes first."""
    steps: int | None = None
    """Optimiser steps at most."""
    tokens: int | None = None
    """Tokens at most."""
    optimizer: str = "adam"
    """adam, adam8 (8-bit state), signum, or muon (matrices; Adam for vectors)."""
    lr: float | None = None
    """Learning rate; None: by the field's rule for the optimiser."""
    lr_warmup_steps: int | None = None
    """Optimiser steps of linear warm-up; None: 1000, or a tenth of a shorter run."""
    lr_schedule: str = "linear"
    """After the warm-up: linear or cosine decay to 0, or constant."""
    max_grad_norm: float | None = None
    """Scale down the gradients of a layer's decoder, or of its encoder, whose norm is above this; never of
    all layers together, because they are used up one at a time."""
    kinds: tuple[str, ...] = KINDS
    """Kinds of tokens that count."""
    exclude: tuple[str, ...] = ()
    """Kinds that do not count, and `sink`."""
    exclude_token_ids: tuple[int, ...] = ()
    """Ids of the vocabulary whose tokens do not count."""
    keep_kind: tuple[tuple[str, float], ...] = ()
    """(kind, share): of its tokens only that share is trained on; held-out tokens all count."""
    dtype: str = "float32"
    """Of weights and arithmetic. bfloat16: encoder and decoder matrices are kept in it, rounded
    stochastically when updated; biases, skips, the optimiser's state and arithmetic stay in float32 (on a GPU
    with TF32 products, and gradient rows in bfloat16 on the way to decoders)."""
    device: str | None = None
    """None: cuda where there is one, else cpu."""
    offload: str = "none"
    """Where decoders and their optimiser state live: on the device (none), or, passing through it a layer at
    a time, in memory of the host, or in files beside the run folder (disk)."""
    compile: bool = False
    """Compile what adam8 does with a weight; the first step takes a minute longer. Of no use to other
    optimisers: theirs are single kernels."""
    io: str = "mmap"
    """mmap, or pread for network file systems."""
    threads: int | None = None
    """Decoding threads; None: one a core, at most 16."""
    buffer_tokens: int = 8192
    """Tokens decoded and shuffled together. Two such buffers are held; `memory.read_memory` says how much."""
    shuffle_windows: int | None = None
    """Windows that are mixed with each other; None: all, or as many as the stage holds twice."""
    stage_dir: Path | None = None
    """Where shards of caches on stores wait for their turn; None: `staged` beside the run's folder."""
    stage_gb: float = 100.0
    """Room for them, in 1e9 bytes."""
    order: str = "shuffled"
    """Or sequential: tokens as they lie on disk, to see what shuffling is worth. No option of `clt`."""
    seed: int = 0
    """Of the weights, and of the reading order."""
    order_seed: int | None = None
    """Of the reading order; None: `seed`."""
    save_every: int = 1000
    """Optimiser steps between checkpoints; the last step is always saved."""
    keep: int = 1
    """Checkpoints that stay."""
    save_best: bool = False
    """Measure held-out FVU at each checkpoint; `best` names the one of the smallest, which stays too."""
    log_every: int = 1
    """Optimiser steps between lines of metrics.jsonl."""
    log_to_wandb: bool = False
    """The same lines to Weights & Biases."""

    def __post_init__(self) -> None:
        _one_of("loss-fn", self.loss_fn, LOSS_FNS)
        _one_of("fvu-variance", self.fvu_variance, FVU_VARIANCES)
        _one_of("lr-schedule", self.lr_schedule, SCHEDULES)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("io", self.io, IO)
        _one_of("order", self.order, ORDERS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("offload", self.offload, OFFLOADS)
        self._check_losses()
        for kind in self.kinds:
            _one_of("kinds", kind, KINDS)
        for kind in self.exclude:
            _one_of("exclude", kind, EXCLUDABLE)
        for kind, share in self.keep_kind:
            _one_of("keep-kind", kind, KINDS)
            if not 0 < share <= 1:
                raise ValueError(f"--keep-kind: expected a share above 0 and at most 1, found {kind}={share}")
        for name in AT_LEAST_ONE:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"--{name.replace('_', '-')}: expected at least 1, found {value}")
        for name in ("epochs", "lr", "max_grad_norm", "stage_gb"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                option = name.replace("_", "-")
                raise ValueError(f"--{option}: expected more than 0 and finite, found {value}")
        if self.compile and self.optimizer != "adam8":
            raise ValueError(
                f"--compile is for --optimizer adam8; found {self.optimizer}, which would gain nothing"
            )
        if self.optimizer == "adam8" and self.dtype == "float64":
            raise ValueError(
                "--optimizer adam8 keeps its state in 8 bits: expected --dtype float32 or bfloat16"
            )

    def _check_losses(self) -> None:
        sparse = self.transcoder.activation not in WITH_K
        name = self.transcoder.activation
        if sparse and self.sparsity_coeff is None:
            raise ValueError(f"--sparsity-coeff: {name} needs one, such as 1e-3; found none")
        if not sparse and self.sparsity_coeff is not None:
            raise ValueError(f"--sparsity-coeff: {name} is sparse by --k; expected none, or relu or jumprelu")
        if self.k_anneal_steps and name not in ("topk", "batchtopk"):
            raise ValueError(f"--k-anneal-steps: expected --activation topk or batchtopk, found {name}")
        for option in NOT_NEGATIVE:
            if not 0 <= (getattr(self, option) or 0) < math.inf:
                found = getattr(self, option)
                raise ValueError(
                    f"--{option.replace('_', '-')}: expected at least 0 and finite, found {found}"
                )

    @property
    def step_tokens(self) -> int:
        return self.batch_tokens * self.grad_acc_steps

    @property
    def read_seed(self) -> int:
        """Of the reading order."""
        return self.seed if self.order_seed is None else self.order_seed

    def to_json(self) -> dict[str, Any]:
        data = asdict(self)
        paths = {name: None if data[name] is None else str(data[name]) for name in ("finetune", "stage_dir")}
        return {**data, "caches": [name_of(c) for c in self.caches], "run": str(self.run), **paths}


def config_of(options: dict[str, Any]) -> TrainConfig:
    """From options by name, those of the transcoder's structure among the others."""
    structure = {field.name for field in fields(TranscoderConfig)}
    transcoder = TranscoderConfig(**{name: options[name] for name in structure & options.keys()})
    rest = {name: value for name, value in options.items() if name not in structure}
    return TrainConfig(transcoder=transcoder, **rest)


def config_from_json(data: dict[str, Any]) -> TrainConfig:
    """The config of a run's config.json; raises TypeError on fields that this version does not know."""
    lists = {name: tuple(data[name]) for name in ("kinds", "exclude", "exclude_token_ids")}
    lists["keep_kind"] = tuple((kind, share) for kind, share in data["keep_kind"])
    caches = tuple(Path(c) for c in data["caches"])
    k = data["transcoder"]["k"]
    transcoder = TranscoderConfig(**{**data["transcoder"], "k": tuple(k) if isinstance(k, list) else k})
    paths = {name: data[name] and Path(data[name]) for name in ("run", "finetune", "stage_dir")}
    return TrainConfig(**{**data, **lists, **paths, "caches": caches, "transcoder": transcoder})


def default_lr(optimizer: str, latents: int) -> float:
    rate, by_root, _ = DEFAULT_LR[optimizer]
    return float(rate / (latents / 2**14) ** 0.5) if by_root else rate


def lr_rule(optimizer: str) -> str:
    """Where `default_lr` comes from, in words."""
    rate, by_root, whose = DEFAULT_LR[optimizer]
    return f"{rate:g}{' ' + ROOT_RULE if by_root else ''}, {whose}"


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"--{name}: expected one of {', '.join(allowed)}, found {value!r}")
