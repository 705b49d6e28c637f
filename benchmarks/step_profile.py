"""Where the time of a step goes: shares of it, by the kind of kernel that it was spent in."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from clt.train import cpu_codes, sparse

OURS = {
    "sparse products": ("decode", "gradients", "products", "tiled", "transpose"),
    "top-k": ("top_k", "screen", "top_k_of"),
}
"""Functions of `cpu_codes`; those of a sparse product bring its operands into order, too."""
KINDS = {
    "matrix products": ("aten::addmm", "aten::mm"),
    "sparse products": ("aten::sparse_sampled_addmm", "aten::embedding_bag", *OURS["sparse products"]),
    "top-k": ("aten::topk", *OURS["top-k"]),
    "optimiser": ("aten::_fused_adam_",),
}
"""Operations of each kind, with what they call; `cpu_codes`' by their names there. A product with a CSR
matrix is an aten::addmm too."""
SPARSE = "sparse product"
NAMED = [
    (sparse, "_product", SPARSE),
    *((cpu_codes, name, name) for kind in ("sparse products", "top-k") for name in OURS[kind]),
]
"""What the profiler does not see, and the name that it gets: (module, function, name)"""


def report(step: Callable[[], object]) -> None:
    """Print the shares of one step on a CPU."""
    found = shares(step)
    print("\nOf the step: " + ", ".join(f"{share:.0%} {kind}" for kind, share in found.items()))
    kernels = sum(found[kind] for kind in ("matrix products", "sparse products", "top-k"))
    print(
        f"matrix, sparse and top-k kernels: {kernels:.0%}, and {kernels / (1 - found['optimiser']):.0%} of "
        "what is not the optimiser",
        flush=True,
    )


def shares(step: Callable[[], object]) -> dict[str, float]:
    """Of the calling thread's time in one step; they add up to 1."""
    with _named(), profile(activities=[ProfilerActivity.CPU]) as trace:
        step()
    times: dict[str, float] = defaultdict(float)
    for event in trace.events() or ():
        times[_kind(event)] += event.self_cpu_time_total
    whole = sum(times.values())
    return {kind: times[kind] / whole for kind in (*KINDS, "other")}


def _kind(event: Any) -> str:
    """Of an operation, or of that around it which has a kind."""
    while event is not None:
        above = event.cpu_parent
        if event.name == "aten::addmm" and above is not None and above.name == SPARSE:
            return "sparse products"
        for kind, names in KINDS.items():
            if event.name in names:
                return kind
        event = above
    return "other"


@contextmanager
def _named() -> Iterator[None]:
    """Within, the functions of NAMED tell the profiler that they run."""
    plain = [getattr(module, function) for module, function, _ in NAMED]

    def named(call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def recorded(*arguments: Any, **named_arguments: Any) -> Any:
            with record_function(name):
                return call(*arguments, **named_arguments)

        return recorded

    for (module, function, name), call in zip(NAMED, plain, strict=True):
        setattr(module, function, named(call, name))
    try:
        yield
    finally:
        for (module, function, _), call in zip(NAMED, plain, strict=True):
            setattr(module, function, call)
