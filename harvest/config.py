"""What a harvest is told. Imports nothing heavy, so that `clt --help` stays quick."""

from dataclasses import dataclass
from pathlib import Path

INPUT_SITES = ("mlp_in", "resid_mid")
PRECISIONS = ("int8", "bf16")
ON_BAD_SAMPLE = ("skip", "fail")
LOAD_IN = ("8bit", "4bit")
DTYPES = ("auto", "float32", "bfloat16", "float16")
KINDS = ("text", "image", "bos", "template")


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    model: str
    """Hub id or folder of a language model or a vision-language model."""
    dataset: str
    """A .jsonl, .json or .parquet file, a folder of `datasets`, or a hub name."""
    cache: Path
    """Folder to write; one that exists is resumed."""
    tokens: int | None = None
    """Stop after this many stored tokens of split train (of all ranks); None: the whole dataset."""
    layers: str | None = None
    """`0-31`, `0,4,8`, `0-31:4`; None: all."""
    input_site: str = "mlp_in"
    """mlp_in: what the MLP reads; resid_mid: the residual stream before the MLP's norm."""
    precision: str = "int8"
    """int8: block-scaled codes; bf16: bit-exact."""
    step_divisor: float = 8.0
    """int8 step = rms / this."""
    window: int = 16384
    """Tokens shuffled and committed together."""
    val_fraction: float = 0.01
    """Share of the samples that goes to split val, by a hash of the sample's id."""
    ctx_len: int = 1024
    """Tokens a sample, image tokens included; an image is never cut in two."""
    keep_image_tokens: float = 1.0
    """Random fraction of each image's tokens that is stored, seeded by the image."""
    exclude: tuple[str, ...] = ()
    """Kinds that are never stored."""
    image_root: Path | None = None
    """Folder that the dataset's image paths are relative to; None: the dataset's own folder."""
    text_column: str | None = None
    """Column of plain text; None: found."""
    split: str = "train"
    """Split of a hub dataset or of a folder of `datasets`."""
    max_samples: int | None = None
    """Read at most this many samples (of all ranks)."""
    allow_outside: bool = False
    """Image paths may leave image_root."""
    fetch_urls: bool = False
    """Images named by http and https addresses are fetched."""
    workers: int | None = None
    """Threads that read and prepare samples ahead of the model; None: half the cores, at most 8."""
    shuffle_seed: int = 0
    """Seeds the order of the samples, the split, the windows, and the choice of image tokens."""
    batch_tokens: int = 8192
    """Tokens in one forward pass, padding included."""
    dtype: str = "auto"
    """The model's numbers; auto: as its folder says."""
    device: str | None = None
    """None: cuda where there is one, else cpu."""
    device_map: str | None = None
    """`auto` spreads the model over all devices, and host memory where they do not suffice."""
    load_in: str | None = None
    """8bit or 4bit: weights that bitsandbytes rounds while it loads them; None: as `dtype` says."""
    revision: str | None = None
    """Of a hub model."""
    attn: str | None = None
    """Attention implementation; None: the library's choice."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    mlp: str | None = None
    """Path pattern of the MLPs, such as `model.language_model.layers.{}.mlp`; None: found."""
    on_bad_sample: str = "skip"
    """skip: list it in rejected.jsonl and go on; fail: stop."""
    max_bad_fraction: float = 0.05
    """Stop when more samples than this share are bad."""
    stage_dir: Path | None = None
    """Where windows wait that go up to a store; None: `staged`"""
    stage_gb: float = 100.0
    """Room for them, in 1e9 bytes"""
    uploads: bool = False
    """The cache's folder is such a place"""
    rank: int = 0
    """This process, of world_size that write one cache."""
    world_size: int = 1

    def __post_init__(self) -> None:
        _one_of("input-site", self.input_site, INPUT_SITES)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("on-bad-sample", self.on_bad_sample, ON_BAD_SAMPLE)
        _one_of("dtype", self.dtype, DTYPES)
        if self.load_in is not None:
            _one_of("load-in", self.load_in, LOAD_IN)
        if self.device is not None and self.device_map is not None:
            raise ValueError("--device-map: expected no --device beside it, found both; leave one out")
        for kind in self.exclude:
            _one_of("exclude", kind, KINDS)
        for name, share in (
            ("val-fraction", self.val_fraction),
            ("keep-image-tokens", self.keep_image_tokens),
            ("max-bad-fraction", self.max_bad_fraction),
        ):
            if not 0 <= share <= 1:
                raise ValueError(f"--{name}: expected a fraction from 0 to 1, found {share}")
        for name, count in (
            ("tokens", self.tokens),
            ("ctx-len", self.ctx_len),
            ("batch-tokens", self.batch_tokens),
            ("max-samples", self.max_samples),
            ("workers", self.workers),
        ):
            if count is not None and count < 1:
                raise ValueError(f"--{name}: expected at least 1, found {count}")
        if self.window < 64 or self.window % 64:
            raise ValueError(f"--window: expected a multiple of 64, found {self.window}")
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"--rank: expected 0 to {self.world_size - 1}, found {self.rank}")


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"--{name}: expected one of {', '.join(allowed)}, found {value!r}")
