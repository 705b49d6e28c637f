"""Whether quantise.c, gather.c and huffman.c are compiled in; without them libraries do it, slower."""

from importlib.util import find_spec

COMPILED = all(find_spec(f"{__package__}.{name}") for name in ("_quantise", "_gather", "_huffman"))
ADVICE = (
    "the compiled part of the codec is missing, numpy does its work at a fraction of the speed; "
    "install a C compiler and Python's headers, then this package again"
)
