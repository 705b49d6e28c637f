"""How much memory `clt features` takes at most: a formula of sizes, which a test holds a process against."""

from ..cache_format.layout import CHUNK, vector_bytes
from ..train.memory import THREAD_BYTES
from ..train.shape import Shape
from ..train.source import Source, default_threads
from .directions import ROWS
from .feature_pages import LOOKED_UP
from .features_config import FeaturesConfig
from .latents import LatentStatistics
from .sample_pages import TOKEN_BYTES

CODE_BYTES = 120
"""Of each code of a batch while it is counted and offered to the examples."""
FOUND_BYTES = 72
"""Of each activation that is looked up, while those of many examples are put in order."""
AS_OBJECTS = 7
"""A line of samples.jsonl as Python objects, over its bytes in the file."""
LATENT_BYTES = 2500
"""Of a latent's examples, those that wait to be sorted in, its directions, and its row of the list."""


def memory_bytes(config: FeaturesConfig, shape: Shape, source: Source, codes: float, words: int = 0) -> int:
    """Of host and device together, beside the process itself and one picture.

    codes: of a token in a layer, that is L0; words: of the vocabulary, with --model. No part
    grows with tokens times latents; with the tokens grow their table and the log of samples alone.
    """
    matrix, batch = 4 * shape.n_latents * shape.d_model, config.batch_tokens
    statistics = 2 * LatentStatistics.memory_bytes(shape.n_latents, config.sizes)  # twice while it is saved
    stored = vector_bytes(shape.d_model, source.manifest.precision == "int8")
    threads = config.threads or default_threads()
    reading = 4 * batch * (stored + 16) + threads * (4 * CHUNK * stored + THREAD_BYTES)
    encoding = (
        2 * matrix + 4 * batch * (2 * shape.d_model + 2 * shape.n_latents) + int(batch * codes) * CODE_BYTES
    )
    rows = 4 * ROWS * (config.similar * shape.d_model + 6 * shape.d_model + 2 * shape.n_latents + 3 * words)
    writing = (3 if words else 2) * matrix + rows + int(min(LOOKED_UP, source.n_tokens * codes)) * FOUND_BYTES
    lines = sum(journal.logs.samples.size for cache in source.caches for journal in cache.journals)
    tokens = len(source.kind) * TOKEN_BYTES + source.memory_bytes() + AS_OBJECTS * lines
    unembedding = 4 * words * shape.d_model
    return (
        statistics + max(reading + encoding, writing) + shape.n_latents * LATENT_BYTES + tokens + unembedding
    )
