"""A step of many ranks, simulated event by event, beside the closed formula of planning/rank_cost.py.

    python benchmarks/simulate_ranks.py [--steps 20]

Each rank has a device, a disk, decoding threads, a link to the others and one to its host memory; each does
one thing at a time. Buffers are read and decoded one ahead of the one that is served. A step has all its
micro-batches before it begins; it encodes all own sources, exchanges codes, decodes target after target
(where decoders live in the host, they come a layer ahead), exchanges the codes' gradients, and goes back
through the encoders. Ranks meet at both exchanges. The formula knows nothing of this order: it takes the
slowest rank's sums, and the largest of what goes on at the same time.
"""

import argparse
from dataclasses import dataclass, field

from clt.planning.rank_cost import StepTime, Work, slowest, step_time
from clt.planning.scaling import CACHE, Box, boxes
from clt.train.ranks import Mesh


@dataclass
class Rank:
    """One rank's clocks, in seconds."""

    mesh: Mesh
    work: Work
    cost: StepTime
    device: float = 0.0
    link: float = 0.0
    """When the link to the host is free"""
    ready: list[float] = field(default_factory=list)
    """By buffer: when it was decoded"""
    taken: list[float] = field(default_factory=list)
    """By buffer: when it was begun to be served"""

    def read_until(self, tokens: int) -> float:
        """When all buffers that hold the first `tokens` tokens are decoded; served as soon as they are."""
        share = self.work.buffer_tokens / self.work.step_tokens
        while len(self.ready) * self.work.buffer_tokens < tokens:
            number = len(self.ready)
            # two buffers: this one is begun when the one before it is begun to be served
            free = self.taken[number - 1] if number else 0.0
            self.ready.append(free + max(self.cost.read, self.cost.decode) * share)
            before = self.taken[-1] if self.taken else 0.0
            self.taken.append(max(self.ready[-1], self.device, before))
        return self.ready[-1]

    def encode(self, step: int) -> float:
        """When this rank's codes can go: a step has all its micro-batches before it begins."""
        self.device = max(self.device, self.read_until((step + 1) * self.work.step_tokens))
        self.device += self.cost.encode
        return self.device

    def targets(self, begin: float) -> float:
        """When this rank's gradients of codes can go: layer after layer, the next one on its way."""
        shape, own = self.work.shape, self.mesh.own
        pairs = {target: len(shape.sources(target)) for target in own}
        total = sum(3 * n for n in pairs.values()) + 2 * len(own)
        weights = sum(pairs.values()) + len(own)
        self.device = arrived = begin
        for target in own:
            share = pairs[target] / sum(pairs.values())
            # a layer's decoders come while the one before works, and go home while the one after does
            self.link = max(self.link, arrived) + self.cost.move * share
            arrived = self.device = max(self.device, self.link) if self.cost.move else self.device
            self.device += self.cost.sparse * 3 * pairs[target] / total
            self.device += self.cost.update * pairs[target] / weights
        return self.device

    def sources(self, begin: float) -> None:
        shape, own = self.work.shape, self.mesh.own
        total = sum(3 * len(shape.sources(target)) for target in own) + 2 * len(own)
        weights = sum(len(shape.sources(target)) for target in own) + len(own)
        self.device = begin + self.cost.sparse * 2 * len(own) / total + self.cost.update * len(own) / weights


def simulate(box: Box, steps: int) -> float:
    """Seconds of a step in the long run."""
    ranks = [
        Rank(mesh, box.work, step_time(box.work, mesh, box.machine, CACHE))
        for mesh in Mesh.of(box.work.shape, box.world, 0).everyone
    ]
    half = max(rank.cost.wire for rank in ranks) / 2
    ends = []
    for step in range(steps):
        begin = max(rank.encode(step) for rank in ranks) + half
        begin = max(rank.targets(begin) for rank in ranks) + half
        for rank in ranks:
            rank.sources(begin)
        ends.append(max(rank.device for rank in ranks))
    warm = steps // 2
    return (ends[-1] - ends[warm - 1]) / (steps - warm)


def table(steps: int) -> str:
    """Predicted and simulated tokens a second, as Markdown."""
    names = ["devices", "buffer", "predicted tokens/s", "simulated", "predicted / simulated"]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    narrow = [box._replace(work=box.work._replace(buffer_tokens=8192)) for box in boxes()]
    for box in [*boxes(), *narrow]:
        expected = box.work.step_tokens / predicted(box)
        simulated = box.work.step_tokens / simulate(box, steps)
        name = f"{box.name} | {box.work.buffer_tokens}"
        lines.append(f"| {name} | {expected:.0f} | {simulated:.0f} | {expected / simulated:.2f} |")
    return "\n".join(lines)


def predicted(box: Box) -> float:
    """Seconds of a step by the formula."""
    return slowest(box.work, box.world, box.machine, CACHE).total(box.work.hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    print(table(parser.parse_args().steps))


if __name__ == "__main__":
    main()
