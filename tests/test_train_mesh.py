"""Who owns which layers, and what that weighs: arithmetic."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clt.train.memory import llava_shape
from clt.train.ranks import Mesh, deal, imbalance, needed, parameters, shared, wire_bytes
from clt.train.shape import Shape

COLUMNS = ("codes", "code_grads", "sums", "replicas")


def shape_of(n_layers: int, n_targets: int, tie: str = "none", skip: bool = False) -> Shape:
    return Shape(tuple(range(n_layers)), 16, 40, k=4, n_targets=n_targets, tie=tie, skip=skip)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 100))
def test_every_layer_has_one_owner_and_every_shard_as_many(n_layers: int, world: int, n_targets: int) -> None:
    """Give or take one layer; and replicas only where ranks cannot all be shards."""
    mesh = Mesh.of(shape_of(n_layers, n_targets), world, 0)
    assert mesh.shards * mesh.replicas == world
    assert mesh.shards <= n_layers
    if world <= n_layers:
        assert mesh.replicas == 1
    counts = [len(mesh.owned(shard)) for shard in range(mesh.shards)]
    assert sum(counts) == n_layers
    assert max(counts) - min(counts) <= 1
    owned = {each.rank: each.own for each in mesh.everyone}
    assert all(owned[rank] == owned[rank % mesh.shards] for rank in owned)
    assert sorted(rank for each in mesh.everyone for rank in [each.peer(each.shard)]) == list(range(world))


@given(st.integers(2, 40), st.integers(2, 8), st.integers(1, 100))
def test_decoders_are_as_balanced_as_layers_allow(n_layers: int, shards: int, n_targets: int) -> None:
    """No shard has more than a mean one and one layer's."""
    shape = shape_of(n_layers, n_targets)
    shards = min(shards, n_layers)
    owners = deal(shape, shards)
    pairs = [sum(len(shape.sources(t)) for t in range(n_layers) if owners[t] == s) for s in range(shards)]
    assert max(pairs) <= 1.05 * (shape.n_pairs / shards + min(n_targets, n_layers) + 1)


@pytest.mark.parametrize("tie", ["none", "source", "target"])
@pytest.mark.parametrize("skip", [False, True])
def test_parameters_of_shards_are_those_of_the_transcoder(tie: str, skip: bool) -> None:
    shape = shape_of(7, 3, tie, skip)
    mesh = Mesh.of(shape, 3, 0)
    assert sum(parameters(shape, mesh.owned(shard)) for shard in range(3)) == shape.n_parameters


def test_neighbours_stay_together_where_they_are_balanced() -> None:
    """With few targets blocks are as balanced as dealt layers, and need fewer codes of others."""
    assert deal(shape_of(32, 1), 4) == tuple(layer // 8 for layer in range(32))
    assert len(set(deal(llava_shape(), 8)[:4])) > 1


def test_llava_is_balanced_and_sends_kilobytes_a_token() -> None:
    """At most 10 KiB of codes and their gradients from any rank: less than all codes of all layers.

    From 16 shards on one of them has two targets of 16 sources, or one, where a mean shard has 12.25 a layer.
    """
    shape = llava_shape()
    for world, most in ((2, 1.01), (4, 1.01), (8, 1.01), (16, 1.29), (32, 1.29), (64, 1.29)):
        mesh = Mesh.of(shape, world, 0)
        assert imbalance(shape, mesh) < most, world
        wire = [wire_bytes(shape, each, 4096) for each in mesh.everyone]
        assert max(each.codes + each.code_grads for each in wire) / 4096 <= 32 * 32 * (4 + 2 + 4)


def test_who_shares_a_decoder() -> None:
    """Tied by source: every shard with a target of it but the owner's; else nobody."""
    shape = shape_of(4, 2, "source")
    mesh = Mesh((0, 0, 1, 1), shards=2)
    assert shared(shape, mesh) == {1: (1,)}
    assert needed(shape, mesh.owned(1)) == (1, 2, 3)
    assert shared(shape_of(4, 2), mesh) == {}


def test_the_formulas_need_no_torch() -> None:
    """So that `clt plan` can show them at once."""
    code = "import sys; sys.modules['torch'] = None; import clt.train.ranks"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_table_of_the_docs_is_what_the_formulas_say() -> None:
    """Where the checkout has its docs."""
    shape, text = llava_shape(), (Path(__file__).parents[1] / "docs" / "ranks.md").read_text()
    for world in (2, 4, 8, 16, 32, 64):
        mesh = Mesh.of(shape, world, 0)
        wire = [wire_bytes(shape, each, 4096) for each in mesh.everyone]
        most = [max(getattr(each, name) for each in wire) / 4096 for name in COLUMNS]
        row = [world, f"{mesh.shards} x {mesh.replicas}", f"{imbalance(shape, mesh):.2f}"]
        row += [f"{value:,.0f}" for value in most]
        assert f"| {' | '.join(map(str, row))} |" in text
