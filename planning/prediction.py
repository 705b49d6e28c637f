"""What `clt plan` says: bytes, memory and time, each with its value and the formula that gave it."""

from ..cache_format.layout import SITES
from ..cache_format.manifest import PRECISIONS
from ..train.order import perfect_partners, predicted_partners
from .cache_size import cache_bytes, layer_bytes
from .line import Line, hours_text, parts_text, size_text
from .plan_config import PlanConfig
from .training import training_lines


def predict(config: PlanConfig) -> list[Line]:
    """All lines, in the order of the pipeline."""
    return [*_cache_lines(config), *_harvest_lines(config), *training_lines(config), *_reading_lines(config)]


def _cache_lines(config: PlanConfig) -> list[Line]:
    lines, width, layers = [], config.size.d_model, len(config.stored)
    raw = len(SITES) * layers * width * 2
    lines.append(
        Line(
            "cache",
            "uncompressed_bytes_per_token",
            raw,
            f"{size_text(raw)} a token uncompressed",
            f"2 sites * {layers} layers * {width} channels * 2 bytes",
        )
    )
    for precision in PRECISIONS:
        size, coded = config.cache_size(precision), config.coded_as(precision)
        parts = cache_bytes(size, config.tokens or config.window, coded)
        per_token = parts.total / (config.tokens or config.window)
        bits = 8 * per_token * 2 / raw
        ours = config.measured_on if precision == config.precision else "measured on the demo's caches"
        formula = (
            f"codes 2 * {layers} * {width} * {coded.code_bits:.3f} bits ({ours}) "
            + (f"+ log2(step divisor {config.step_divisor:g} / 8), " if precision == "int8" else "")
            + f"scales {coded.scale_bits:.2f} bits a block of 64, indexes 16 bytes a chunk, token table and "
            f"statistics; {parts_text(parts._asdict())}"
        )
        text = f"{size_text(per_token)} a token, {bits:.2f} bits a value"
        lines.append(Line("cache", f"{precision}_bytes_per_token", per_token, text, formula))
        if config.tokens:
            whole = f"bytes a token * {config.tokens} tokens"
            lines.append(
                Line("cache", f"{precision}_bytes", parts.total, f"{size_text(parts.total)} in all", whole)
            )
    return lines


def _harvest_lines(config: PlanConfig) -> list[Line]:
    if config.tokens_per_s is None:
        return []
    size = config.cache_size(config.precision)
    per_token = cache_bytes(size, config.window, config.coded_as(config.precision)).total / config.window
    rate = config.tokens_per_s * per_token
    written = Line(
        "harvest",
        "bytes_per_s",
        rate,
        f"{size_text(rate)}/s written",
        f"{config.tokens_per_s:g} tokens/s * {per_token:.0f} bytes a token ({config.precision})",
    )
    if config.tokens is None:
        return [written]
    hours = config.tokens / config.tokens_per_s / 3600
    formula = f"{config.tokens} tokens / {config.tokens_per_s:g} tokens/s"
    return [Line("harvest", "hours", hours, hours_text(hours), formula), written]


def _reading_lines(config: PlanConfig) -> list[Line]:
    lines, n_layers = [], len(config.layers)
    tokens = config.tokens or config.window
    size = config.cache_size(config.precision)
    epoch = n_layers * layer_bytes(size, tokens, config.coded_as(config.precision))
    if config.tokens:
        formula = f"{config.tokens} tokens * {n_layers} layers * {epoch / tokens / n_layers:.1f} bytes"
        text = f"{size_text(epoch)} an epoch ({config.precision})"
        lines.append(Line("reading", "bytes_per_epoch", epoch, text, formula))
        for speed in config.read_speeds:
            hours = config.epochs * epoch / speed / 1e9 / 3600
            lines.append(
                Line(
                    "reading",
                    f"hours_at_{speed:g}_GB_per_s",
                    hours,
                    f"{hours_text(hours)} at {speed:g} GB/s",
                    f"{config.epochs:g} epochs * {size_text(epoch)} / {speed:g} GB/s",
                )
            )
        lines.append(_pages_line(epoch))
        lines.append(_shuffle_line(config, config.tokens))
    else:
        formula = f"{n_layers} layers * {epoch / tokens / n_layers:.1f} bytes"
        text = f"{size_text(epoch / tokens)} a token and epoch ({config.precision})"
        lines.append(Line("reading", "bytes_per_token", epoch / tokens, text, formula))
    return lines


def _pages_line(epoch: float) -> Line:
    return Line(
        "reading",
        "page_cache_bytes",
        epoch,
        f"up to {size_text(epoch)} of host memory show as taken with --io mmap, where there is room",
        "pages of the cache's files, all that an epoch reads; they are the system's, which takes them back "
        "at need, and are in no line above; --io pread leaves them out of the process",
    )


def _shuffle_line(config: PlanConfig, tokens: int) -> Line:
    sizes = (config.batch_tokens, config.sample_tokens, tokens)
    windows = config.shuffle_windows
    m = predicted_partners(*sizes, config.window, config.buffer_tokens, shuffle_windows=windows)
    perfect = perfect_partners(*sizes)
    return Line(
        "reading",
        "shuffle_m",
        m,
        f"a token will meet {m:.2f} others of its sample in a batch; {perfect:.2f} if order were perfect",
        f"train/order.py, predicted_partners: about (batch {config.batch_tokens} - 1) * "
        f"(sample {config.sample_tokens:g} - 1) * (chunk 64 / (buffer {config.buffer_tokens} * "
        f"window {config.window}) + 1 / "
        f"{min(tokens, (windows or tokens) * config.window)} tokens that are mixed)",
    )
