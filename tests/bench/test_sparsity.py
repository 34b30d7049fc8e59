"""The arithmetic of `bench.sparsity`: bytes against tensors that are there, rivals of no fewer bytes, its tables."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import sparsity as bench
from features.schema import Schema, Sparse
from recsys.device import CPU
from recsys.distributed import reset_tables, shard
from recsys.models import ModelConfig, build_model
from recsys.models.dcn import DCNConfig
from recsys.sparsity.config import Schedule, Sparsity
from recsys.sparsity.describe import bytes_of

SCHEMA = Schema(
    keys=(),
    dense=(),
    sparse=(Sparse(name="user", rows=600), Sparse(name="item", rows=400)),
    labels=("click",),
    item="item",
)
WAYS: dict[str, dict[str, Any]] = {
    "moving": {},
    "element": {"state": "element"},
    "unequal": {"schedule": Schedule(redistribute=1.0)},
    "half": {"positions": "half"},
}


def in_training(sparsity: Sparsity | None, dim: int) -> tuple[int, int]:
    """Bytes of the tables' tensors and the optimizer's, where they are trained; of all other parameters."""
    config = DCNConfig(dim=dim, cross_layers=1, hidden=())
    sharded = shard(
        build_model(config, SCHEMA, table_device="meta", sparsity=sparsity), CPU, {"lr": 0.1, "eps": 1e-8}, batch_size=8
    )
    reset_tables(sharded, 0)
    network = sum(p.nbytes for p in sharded.dense.values())
    if sparsity is None:
        return sum(t.weights_RD.nbytes + t.state_R.nbytes for t in sharded.tables.values()), network
    (tables,) = sharded.sparse.values()
    found = [*tables.tensors().values(), *tables.states().values(), tables.place_R]
    return sum(t.nbytes for t in found if t is not None) - tables.tensors()["rows_T"].nbytes, network


@pytest.mark.parametrize("dim", [64, 12])
@pytest.mark.parametrize("sparsity", [None, *(Sparsity(density=d) for d in (0.5, 0.3))])
def test_bytes_are_those_of_the_tensors_in_training(sparsity: Sparsity | None, dim: int) -> None:
    """Adagrad's sums of dense tables are among them."""
    config: ModelConfig = DCNConfig(dim=dim, cross_layers=1, hidden=())
    said = bytes_of(build_model(config, SCHEMA, sparsity=sparsity))
    assert (said.training, said.network) == in_training(sparsity, dim)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("density", [0.05, 0.1, 0.2, 0.5])
def test_the_smaller_dim_is_the_least_of_no_fewer_bytes(density: float, way: str) -> None:
    sparsity = Sparsity(density=density, **WAYS[way])
    dim = bench.smaller_dim(sparsity)
    sparse, _ = in_training(sparsity, bench.DIM)
    assert dim % 4 == 0
    assert in_training(None, dim)[0] >= sparse
    assert dim == 4 or in_training(None, dim - 4)[0] < sparse


def test_every_density_has_its_rivals() -> None:
    chosen = Sparsity(density=0.2, positions="half", schedule=Schedule(interval=7))
    found = {kind.name: kind for kind in bench.kinds(chosen)}
    assert len(found) == len(bench.kinds(chosen))
    for density in bench.DENSITIES:
        names = ("sparse {:g}", "smaller dim, bytes of {:g}", "fixed mask {:g}", "pruned {:g}")
        moving, smaller, fixed, pruned = (found[name.format(density)] for name in names)
        assert moving.sparsity == pruned.sparsity == chosen.model_copy(update={"density": density})
        assert pruned.pruned
        assert not moving.pruned
        assert fixed.sparsity == Sparsity(density=density, schedule=Schedule(grow="none"))
        assert smaller.sparsity is None
        assert smaller.dim == bench.smaller_dim(moving.sparsity or chosen)
        assert {moving.dim, fixed.dim, pruned.dim} == {bench.DIM}
    alike = found["fixed mask 0.2, begun as the moving one"].sparsity
    assert alike == chosen.model_copy(update={"schedule": Schedule(grow="none")})
    least, (below,) = (
        found["smaller dim, bytes of 0.2"],
        [k for k in bench.kinds(chosen, below=True) if k not in found.values()],
    )
    assert below == bench.Kind("smaller dim, fewer bytes than 0.2", 0.2, dim=least.dim - 4)
    plain = [kind.name for kind in bench.kinds(Sparsity(density=0.2))]
    assert not [name for name in plain if "begun" in name]


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_step_with_a_moving_mask_is_the_mean_over_an_interval() -> None:
    interval = bench.INTERVAL
    for watched in (interval, interval // 10):
        steps = [2.0] * (interval - watched) + [3.0] * watched
        assert bench.step_of(2.0, 3.0, 50.0, watched / interval) == pytest.approx((sum(steps) + 50.0) / interval)


class Watching:
    """A mover that only notes what it is told."""

    def __init__(self, calls: list[str]) -> None:
        self.calls = calls

    def before_step(self, step: int) -> None:
        self.calls.append(f"watch {step}")

    def after_step(self, step: int) -> None:
        self.calls.append(f"move {step}")


def test_a_mask_moves_once_a_cycle_by_all_of_its_gradients() -> None:
    calls: list[str] = []
    moves = bench._Moves(bench._in_training(lambda s: bench._Tables(SCHEMA, s), 8, 1)["moving"], 1, 3)
    moves.mover = Watching(calls)  # pyright: ignore[reportAttributeAccessIssue]
    clock = bench.Clock()
    for turn in range(6):
        with moves(clock, turn):
            calls.append("step")
    cycle = ["watch 97", "step", "watch 98", "step", "watch 99", "step", "move 99"]
    assert calls == 2 * cycle
    assert len(clock.seconds["update"]) == 2


def test_the_clock_has_medians_of_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now, done = bench.Clock(), [0.0], []

    def work(seconds: float) -> None:
        done.append(seconds)
        now[0] += seconds

    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])
    for seconds in (1.0, 9.0, 2.0):
        clock("dense_step", lambda s=seconds: work(s))
        now[0] += 100  # what is between is not timed
        for name in ("sparse_step", "moving_step", "update"):
            clock(name, lambda s=seconds: work(s))
    assert len(done) == 12
    mean = pytest.approx(bench.step_of(2.0, 2.0, 2.0, 1.0))
    assert clock.medians() == {"dense_step": 2.0, "sparse_step": 2.0, "moving_step": mean, "watched_step": mean}


def test_every_kind_is_first_equally_often() -> None:
    models = dict.fromkeys("abcd")
    orders = [[name for name, _ in bench._from(models, turn)] for turn in range(8)]
    assert all(sorted(order) == ["a", "b", "c", "d"] for order in orders)
    assert [order[0] for order in orders] == [*"abcdabcd"]


def test_ids_of_zipf_are_as_frequent_as_they_should_be() -> None:
    rows, total = 1000, 200_000
    ids = bench.zipf_ids(np.random.default_rng(0), rows, total)
    assert (ids.min(), ids.max()) == (0, rows - 1)
    share = np.bincount(ids, minlength=rows) / total
    wanted = np.array([1 / (r + 1) ** bench.ZIPF for r in range(rows)])
    wanted /= wanted.sum()
    assert np.abs(share - wanted).max() < 5 * np.sqrt(wanted.max() / total)
    assert share[500:].sum() == pytest.approx(wanted[500:].sum(), rel=0.05)  # the last id holds no more than its own


@pytest.mark.parametrize("multi", [False, True])
def test_batches_have_an_id_or_up_to_twenty(multi: bool) -> None:
    batch = bench._random_batch(np.random.default_rng(0), 50, "uniform", multi)
    lengths = batch.sparse.lengths()
    assert len(lengths) == bench.FIELDS * bench.BATCH_OF_FIELDS
    assert set(lengths.tolist()) == (set(range(1, 21)) if multi else {1})
    assert set(batch.sparse.values().tolist()) == set(range(50))


def test_a_gowalla_step_trains_all_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "USERS", 300)
    monkeypatch.setattr(bench, "ITEMS", 200)
    monkeypatch.setattr(bench, "BATCH_OF_PAIRS", 64)
    made: list[Any] = []
    monkeypatch.setattr(bench, "shard", lambda *a, **k: made.append(shard(*a, **k)) or made[-1])
    threads = torch.get_num_threads()
    found = bench._gowalla_steps(1, 2)
    torch.set_num_threads(threads)
    assert set(found) == {"dense_step", *bench.STEPS}
    assert all(0 < seconds < 60 for seconds in found.values())
    assert [bool(s.sparse) for s in made] == [False, True, True, True]
    sums = [s.tables["user"].state_R if s.tables else next(iter(s.sparse.values())).groups[0].state for s in made]
    assert all(t is not None and bool(t.any()) for t in sums)  # all were updated


# --- memory -----------------------------------------------------------------------------------------------------------


def test_the_peak_is_of_what_was_resident() -> None:
    before = bench._resident()
    held = torch.ones(2**26)  # 256 MiB
    assert bench._resident() > before + 200 * 2**20
    del held
    assert bench._peak() > before + 200 * 2**20


# --- the tables -------------------------------------------------------------------------------------------------------


def written(folder: Path, *found: dict[str, Any]) -> Path:
    path = folder / "records.jsonl"
    lines = [{"config_hash": "x", "commit": "c", "seed": 1, **record} for record in found]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_times_are_shares_of_dense_in_the_same_run(tmp_path: Path) -> None:
    steps = {"dense_step": 0.1, "sparse_step": 0.05, "moving_step": 0.06, "watched_step": 0.15, "element_step": 0.2}
    looks = {"dense_lookup": 0.01, "sparse_lookup": 0.02, "element_lookup": 0.03}
    file = written(
        tmp_path,
        {"name": "time | Zipf, one id", **steps, **looks},
        {"name": "scoring | Zipf, one id", "dense_scoring": 0.004, "sparse_scoring": 0.005},
        {"name": "step | Gowalla", **{k: v / 10 for k, v in steps.items()}},
    )
    *_, fields, gowalla = bench.time_table(file).splitlines()
    assert fields == "| Zipf, one id | 100.0 ms | 0.50 | 0.60 | 1.50 | 2.00 | 10.0 ms | 2.00 | 4.0 ms | 1.25 | 1 |"
    assert gowalla == "| Gowalla | 10.0 ms | 0.50 | 0.60 | 1.50 | 2.00 |  |  |  |  | 1 |"


def test_quality_is_a_share_of_dense(tmp_path: Path) -> None:
    chosen = Sparsity(density=0.2)
    file = written(
        tmp_path,
        {"name": "gowalla | dense", "recall": 0.2, "ndcg": 0.1, "bytes": 2**21},
        {"name": "gowalla | sparse 0.2", "recall": 0.1, "ndcg": 0.08, "bytes": 2**20},
        {"name": "gowalla | sparse 0.2", "seed": 2, "recall": 0.2, "ndcg": 0.08, "bytes": 2**20},
    )
    *_, dense, sparse = bench.quality_table(file, "gowalla", chosen, {"recall": "R", "ndcg": "N"}).splitlines()
    assert dense == "| dense | 0.2000 | 0.1000 | 1.000 | 2.0 MiB | 1 |"
    assert sparse == "| sparse 0.2 | 0.1500 ± 0.0707 | 0.0800 ± 0.0000 | 0.750 | 1.0 MiB | 2 |"


def test_without_records_there_are_no_tables(tmp_path: Path) -> None:
    assert set(bench.tables(tmp_path / "none.jsonl").values()) == {""}
