"""Several ranks and one store: each fetches the shards of its own layers; what they write is one cache."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from object_store import BUCKET, Proxy
from planted import write_planted
from test_remote_training import shard_gets
from test_train_ranks import configure, job, require_same, run_ranks

from clt.cache_format import open_cache, verify_cache
from clt.remote.copying import Folder, copy_cache
from clt.remote.store import Store
from clt.train.loop import train
from clt.train.ranks import Mesh
from clt.train.shape import Shape

pytest.importorskip("obstore")  # the extra dev has them
pytest.importorskip("moto")

LAYERS = 3


def test_each_rank_fetches_its_own_layers_once(proxy: Proxy, tmp_path: Path) -> None:
    """Together every shard, from a store that cuts answers; and the weights are those of one process."""
    local = write_planted(tmp_path / "local", 1500, val=200, layers=LAYERS)
    address = f"s3://{BUCKET}/planted"
    copy_cache(Folder(local), Store(address))
    near = configure(local, tmp_path / "near", steps=20)
    train(near)
    proxy.begin(lambda method, path, nth: "cut" if path.endswith("c.1.1.0") and not nth else None)
    far = configure(Path(address), tmp_path / "far", steps=20, stage_dir=tmp_path / "stage")
    run_ranks(tmp_path, [job(2, far)])
    require_same(near.run, far.run, 1e-9)
    shape = Shape.of(far.transcoder, tuple(range(LAYERS)), open_cache(local).manifest.d_model)
    fetched = {"train": 0, "val": 0}
    for mesh in Mesh.of(shape, 2, 0).everyone:
        for split in fetched:
            shards = {
                path.name for path in (tmp_path / "stage" / f"rank-{mesh.rank}").rglob(f"{split}/mlp_*/c.*")
            }
            assert {int(name.split(".")[2]) for name in shards} == set(mesh.own)
    for split in fetched:
        gets = shard_gets(proxy, split)
        assert len(gets) == 4 * LAYERS * len(open_cache(local)[split].entries)
        again = {path: n for path, n in gets.items() if n > 1}
        assert all(path.endswith("c.1.1.0") and n == 2 for path, n in again.items())


@pytest.mark.slow
def test_torchrun_harvests_to_a_store_and_trains_from_it(proxy: Proxy, tmp_path: Path) -> None:
    """As a user types it: byte for byte the cache of two ranks in a folder, then a run from it."""
    tiny.save_llava(tmp_path / "model")
    tiny.write_dataset(tmp_path, n_pictures=6, n_texts=40)
    name = f"s3://{BUCKET}/ranks"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    harvest = ["harvest", "model", "train.jsonl", "--window", "256", "--val-fraction", "0.1"]
    train = ["--run-name", "r", "--steps", "2", "--batch-tokens", "256", "--k", "4"]
    for words in ([*harvest, name], [*harvest, "local"], ["train", name, *train]):
        done = subprocess.run(
            [*torchrun, "-m", "clt.cli", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
    copy_cache(Store(name), Folder(tmp_path / "back"))
    assert not verify_cache(tmp_path / "back", full=True)
    far, near = (
        {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "back", tmp_path / "local")
    )
    assert far == near
    assert (tmp_path / "checkpoints" / "r" / "report.html").exists()
