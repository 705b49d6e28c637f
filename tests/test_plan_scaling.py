"""What ranks cost: the sums are the whole, the page is the formula's, and a simulation agrees with it."""

import dataclasses
import sys
from pathlib import Path

import pytest
from planted import write_planted

from clt.cache_format import open_cache
from clt.planning.cache_size import CacheSize, layer_bytes, measure_coded
from clt.planning.rank_cost import Work, rank_memory
from clt.planning.scaling import boxes, memory_table, speed_table
from clt.train.memory import llava_shape, offload_memory, step_memory
from clt.train.ranks import Mesh
from clt.train.reader import Reader
from clt.train.source import Source

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import simulate_ranks  # noqa: E402

SIZES = {"tokens": 4096, "grad_acc_steps": 8, "dtype": "bfloat16", "optimizer": "adam8"}
STORED = {"stored_bytes": (4096 + 256) / 4096}


def test_one_rank_is_one_process() -> None:
    shape = llava_shape()
    held = rank_memory(Work(shape), Mesh.of(shape, 1, 0))
    assert held.step == pytest.approx(step_memory(shape, **SIZES, **STORED))
    away = rank_memory(Work(shape, offload="host"), Mesh.of(shape, 1, 0))
    assert (away.step, away.away) == offload_memory(shape, **SIZES, **STORED)


@pytest.mark.parametrize("world", [2, 3, 4, 8, 64])
def test_ranks_hold_the_whole_together(world: int) -> None:
    """Weights and state add up to one process's, times replicas; each needs less than the whole."""
    shape = dataclasses.replace(llava_shape(), d_model=512, n_latents=1024)
    meshes = Mesh.of(shape, world, 0).everyone
    parts = [rank_memory(Work(shape), mesh) for mesh in meshes]
    whole = rank_memory(Work(shape), Mesh.of(shape, 1, 0)).step
    for name in ("parameters", "optimizer"):
        together = sum(getattr(part.step, name) for part in parts) / meshes[0].replicas
        assert together == pytest.approx(getattr(whole, name), rel=1e-6)
    for part in parts:
        assert all(mine <= of_all for mine, of_all in zip(part.step, whole, strict=True))


def test_ranks_read_their_layers_bytes(tmp_path: Path) -> None:
    """Counted by the readers of two ranks over an epoch: together the plan's, within 2 %."""
    path = write_planted(tmp_path / "c", 4000)
    cache = open_cache(path)
    planned = layer_bytes(CacheSize(3, 24, "int8", 16.0, 512), 4000, measure_coded(cache))
    read = []
    for own in ((0,), (1, 2)):
        source = Source([path], "train")
        source.own = own
        with Reader(source, buffer_tokens=512, seed=0, threads=1, epochs=1) as reader:
            for _ in range(10):
                reader.next(400)
        index = 4 * len(own) * len(cache["train"].entries) * (16 * 8 + 4)  # read where a shard is opened
        read.append(source.bytes_read + index)
    assert sum(read) == pytest.approx(3 * planned, rel=0.02)
    assert read[0] == pytest.approx(planned, rel=0.05)  # layers differ a little


def test_the_page_is_the_formulas() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text()
    for table in (memory_table(), speed_table(), simulate_ranks.table(20)):
        assert table in text


def test_every_box_can_hold_its_part() -> None:
    for box in boxes():
        for mesh in Mesh.of(box.work.shape, box.world, 0).everyone:
            assert rank_memory(box.work, mesh).step.device < 0.8 * box.machine.memory, box.name


@pytest.mark.parametrize("buffer", [8192, 32_768])
@pytest.mark.parametrize("number", range(5))
def test_a_simulation_agrees(number: int, buffer: int) -> None:
    """Within 10 %, with reading that is hidden wholly and in part, and with a link a tenth as fast."""
    box = boxes()[number]
    slow = box.machine._replace(wire=box.machine.wire / 10, host_link=box.machine.host_link / 10)
    for machine in (box.machine, slow):
        changed = box._replace(machine=machine, work=box.work._replace(buffer_tokens=buffer))
        simulated = simulate_ranks.simulate(changed, 20)
        assert simulate_ranks.predicted(changed) == pytest.approx(simulated, rel=0.1)
