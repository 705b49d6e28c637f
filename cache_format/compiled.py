"""Whether quantise.c is compiled in; where it is not, numpy gives the same bits, later."""

from importlib.util import find_spec

COMPILED = find_spec(f"{__package__}._quantise") is not None
ADVICE = (
    "the compiled part of the codec is missing, numpy does its work at a fraction of the speed; "
    "install a C compiler and Python's headers, then this package again"
)
