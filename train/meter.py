"""What ranks read and send in a run, measured beside what was predicted, and how evenly they work."""

from typing import NamedTuple

import torch

from .config import TrainConfig
from .exchange import Exchange
from .memory import BYTES
from .ranks import WireBytes, wire_bytes
from .reader import Reader
from .shape import Shape


class Traffic(NamedTuple):
    """Of one rank, from the meter's beginning."""

    read: float
    """Stored bytes for each token that was decoded and counts"""
    read_predicted: float
    sent: WireBytes
    """Bytes for each token of the run"""
    busy: float
    """Share of the time not spent in exchanges"""


class Meter:
    """Begins to count where it is made."""

    def __init__(self, exchange: Exchange, reader: Reader, tokens: int) -> None:
        """tokens: where the run stands."""
        self._exchange, self._reader, self._tokens = exchange, reader, tokens
        self._sent, self._seconds = dict(exchange.sent), exchange.seconds

    def traffic(self, tokens: int, seconds: float) -> list[Traffic]:
        """Of each rank; tokens: where the run stands. All ranks ask at once."""
        exchange, source = self._exchange, self._reader.source
        assert exchange.mesh is not None
        run = max(1, tokens - self._tokens)
        sent = [(exchange.sent[name] - self._sent[name]) / run for name in WireBytes._fields]
        predicted = source.stored_bytes(source.own) / source.n_tokens
        read = source.bytes_read / max(1, self._reader.tokens_read)
        busy = 1 - (exchange.seconds - self._seconds) / seconds
        mine = torch.tensor([read, predicted, busy, *sent], dtype=torch.float64)
        rows = torch.zeros(exchange.world, len(mine), dtype=torch.float64)
        rows[exchange.mesh.rank] = mine
        return [Traffic(row[0], row[1], WireBytes(*row[3:]), row[2]) for row in exchange.total(rows).tolist()]

    def report(self, shape: Shape, config: TrainConfig, tokens: int, seconds: float) -> str | None:
        """A line a rank; None where there is one process, or it took no step."""
        mesh = self._exchange.mesh
        if mesh is None or tokens == self._tokens:
            return None
        lines = ["rank   reads B/token  predicted   sends B/token  predicted    busy"]
        work = max(BYTES[config.dtype], 4)
        for each, found in zip(mesh.everyone, self.traffic(tokens, seconds), strict=True):
            expected = "-"
            if shape.layer_k and not config.k_anneal_steps:
                wire = wire_bytes(shape, each, config.step_tokens, work=work, weight=BYTES[config.dtype])
                expected = f"{wire.total / config.step_tokens:.0f}"
            read = f"{found.read:>13.0f}  {found.read_predicted:>9.0f}"
            sent = f"{found.sent.total:>13.0f}  {expected:>9}"
            lines.append(f"{each.rank:<6} {read}   {sent}  {found.busy:>6.1%}")
        return "\n".join(lines)
