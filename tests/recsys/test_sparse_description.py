"""Sparse tables in numbers: against dense copies, against the tensors and files that are there, and on known noise."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from features.schema import Schema, Sparse, carried
from recsys.bundle import load_model
from recsys.data import ExampleStream
from recsys.device import CPU
from recsys.distributed import Sharded, reset_tables, shard
from recsys.embeddings import shown
from recsys.models import Model, ModelConfig, build_model
from recsys.models.autoint import AutoIntConfig
from recsys.models.dcn import DCNConfig
from recsys.models.esmm import ESMMConfig
from recsys.models.lr import LRConfig
from recsys.sparsity import describe as module
from recsys.sparsity.config import Schedule, Sparsity
from recsys.sparsity.describe import TENTHS, Description, Watch, describe, tenths_of
from recsys.sparsity.tables import SparseTables
from recsys.tensors import load_tensors
from recsys.trainer import TrainConfig, train

AUTOINT = AutoIntConfig(dim=8, layers=1, heads=1, attention_dim=4)
UNEVEN = Sparsity(density=0.5, allocation="popularity", features=("word", "tags", "type"))
CASES = {
    "uneven rows, some tables dense": (AUTOINT, UNEVEN),
    "even rows": (AUTOINT, Sparsity(density=0.5)),
    "padded rows": (AUTOINT, Sparsity(density=0.2)),
    "sums of each weight": (AUTOINT, Sparsity(density=0.2, state="element")),
    "copies": (ESMMConfig(dim=8, shared_embeddings=False), Sparsity(density=0.6)),
    "narrow": (LRConfig(), Sparsity(density=1.0)),
}


def in_training(
    config: ModelConfig, schema: Schema, sparsity: Sparsity | None, counts: dict[str, Tensor] | None
) -> Sharded:
    model = build_model(config, schema, table_device="meta", sparsity=sparsity)
    sharded = shard(model, CPU, {"lr": 0.1, "eps": 1e-8}, batch_size=100)
    reset_tables(sharded, 1, 0.0, counts)
    return sharded


def tables_in(model: torch.nn.Module) -> SparseTables:
    (found,) = (m for m in model.modules() if isinstance(m, SparseTables))
    return found


def rows_of(tables: SparseTables) -> tuple[Tensor, Tensor]:
    """All rows of all tables written out: weights_RD, and whether they exist."""
    weights_RD, exists_RD = torch.zeros(tables.rows, tables.dim), torch.zeros(tables.rows, tables.dim, dtype=torch.bool)
    seen = dict.fromkeys((g.size for g in tables.groups), 0)
    groups = {g.size: g for g in tables.groups}
    for row, size in enumerate(tables.sizes_R.tolist()):
        positions_S = groups[size].positions_NS[seen[size], :size].long()
        weights_RD[row, positions_S] = groups[size].values_NS[seen[size], :size]
        exists_RD[row, positions_S] = True
        seen[size] += 1
    return weights_RD, exists_RD


@pytest.mark.parametrize("case", CASES)
def test_says_what_the_rows_written_out_say(examples, case: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(module, "_CHUNK", 37)  # smaller than the tables
    config, sparsity = CASES[case]
    schema = examples.schema(funnel=case == "copies")
    frame = examples.frame(schema, 900)
    frame = frame.with_columns(word=(pl.col("word") ** 2 // 4000).cast(pl.Int32))  # some are popular
    counts = examples.stream(schema, frame, tmp_path / "x.parquet", 100).row_counts()
    tables = tables_in(in_training(config, schema, sparsity, counts).module)
    found = describe(build_of(config, schema, sparsity, tables), counts)
    assert found is not None
    weights_RD, exists_RD = rows_of(tables)
    for table, start, said in zip(tables.tables, tables.starts, found.tables, strict=True):
        mine = slice(start, start + table.rows)
        lookups_R = np.zeros(table.rows, dtype=np.int64)
        column = frame[table.feature]
        for row in (column.explode(empty_as_null=False, keep_nulls=False) if table.multi else column).to_list():
            lookups_R[row] += 1
        assert (said.name, said.rows, said.sparse) == (shown(table.name), table.rows, table.sparse)
        assert said.field == table.feature
        assert said.active == int(exists_RD[mine].sum())
        assert said.density == pytest.approx(exists_RD[mine].double().mean().item())
        w_RD = weights_RD[mine].double().numpy()
        assert said.magnitude == pytest.approx(np.abs(w_RD).sum())
        mean_D = np.average(w_RD, axis=0, weights=lookups_R)
        assert said.spread == pytest.approx(np.average(((w_RD - mean_D) ** 2).sum(1), weights=lookups_R) ** 0.5)
        order_R = sorted(range(table.rows), key=lambda r: (-lookups_R[r], r))
        parts = [[r for place, r in enumerate(order_R) if place * TENTHS // table.rows == i] for i in range(TENTHS)]
        exists_R = exists_RD[mine].sum(1).numpy()
        wanted = [(len(p), lookups_R[p].sum(), exists_R[p].sum()) for p in parts] if table.rows >= TENTHS else []
        assert [(t.rows, t.lookups, t.active) for t in said.tenths] == wanted
    assert found.budget == sum(t.active for t in found.tables if t.sparse)
    assert found.cells == sum(t.rows for t in tables.tables if t.sparse) * tables.dim
    assert found.active == int(exists_RD.sum())


def build_of(config: ModelConfig, schema: Schema, sparsity: Sparsity, tables: SparseTables) -> Model:
    """A model for scoring with these tables."""
    model = build_model(config, schema, sparsity=sparsity)
    tables_in(model).adopt({n: t.clone() for n, t in tables.tensors().items()}, "test")
    return model


@pytest.mark.parametrize("case", CASES)
def test_counts_the_bytes_that_are_there(examples, case: str, tmp_path: Path) -> None:
    config, sparsity = CASES[case]
    schema = examples.schema(funnel=case == "copies")
    stream = examples.stream(schema, examples.frame(schema, 400), tmp_path / "x.parquet", 100)
    counts = stream.row_counts()
    sharded = in_training(config, schema, sparsity, counts)
    tables = tables_in(sharded.module)
    found = describe(sharded.module, counts)
    assert found is not None
    said, groups = found.sparse, tables.groups
    slots = sum(g.values_NS.nbytes + g.positions_NS.nbytes for g in groups)
    assert said.weights + said.positions + said.padding == slots
    assert (said.weights, said.positions) == (4 * tables.budget, tables.budget)
    assert (said.padding > 0) == any(g.size % 4 for g in groups)
    assert said.state == sum(t.nbytes for t in tables.states().values())
    assert said.sizes == tables.sizes_R.nbytes
    assert said.places == (0 if tables.place_R is None else tables.place_R.nbytes)
    assert said.network == 4 * found.network == sum(p.nbytes for p in sharded.dense.values())

    sharded_dense = in_training(config, schema, None, None)
    dense, plain = found.dense, sharded_dense.tables.values()
    assert dense.weights + dense.padding == sum(t.weights_RD.nbytes for t in plain)
    assert dense.state == sum(t.state_R.nbytes for t in plain)
    assert (dense.padding > 0) == (case == "narrow")

    config_of_training = TrainConfig(batch_size=100, epochs=1, threads=1, table_learning_rate=0.05)
    still = sparsity.model_copy(update={"schedule": Schedule(grow="none")})
    trained = train(config, schema, stream, None, config_of_training, tmp_path / "training", sparsity=still)
    parts = [load_tensors(trained.state / p) for p in ("weights", "table_states", "dense_states")]
    little = sum(t.nbytes for part in parts for n, t in part.items() if n.endswith(("rows_T", "/step")))
    assert said.checkpoint == sum(t.nbytes for part in parts for t in part.values()) - little
    stored = load_model(config, schema, trained.weights, where=tmp_path, sparsity=still).state_dict()
    assert said.bundle == sum(t.nbytes for n, t in stored.items() if not n.endswith("rows_T"))


def test_dense_tables_have_no_description(examples) -> None:
    assert describe(build_model(AUTOINT, examples.schema())) is None


def test_what_is_not_sparse_is_not_hidden(examples) -> None:
    schema = examples.schema()
    found = describe(build_model(AUTOINT, schema, sparsity=Sparsity(density=0.25, features=("word",))))
    assert found is not None
    kept = 8 * sum(f.rows for f in schema.sparse if f.name != "word")
    network = sum(p.numel() for n, p in build_model(AUTOINT, schema).named_parameters() if ".tables." not in n)
    assert (found.network, found.not_sparse, found.budget) == (network, network + kept, 2 * 4000)
    assert found.share_not_sparse == pytest.approx((network + kept) / (network + kept + 2 * 4000))
    assert [t.name for t in found.tables if t.sparse] == ["word"]
    assert all(t.spread is None and not t.tenths for t in found.tables)  # nobody counted lookups
    assert found.strengths()[0].field == "word"


def test_tenths_are_of_equally_many_rows() -> None:
    counts_R = torch.tensor([5, 0, 9, 5, 0, 8, 7, 1, 2, 3])
    assert tenths_of(counts_R).tolist() == [3, 8, 0, 4, 9, 1, 2, 7, 6, 5]  # equal ones by their numbers
    many_R = torch.arange(1000)
    assert torch.bincount(tenths_of(many_R).long()).tolist() == [100] * TENTHS
    assert tenths_of(many_R).tolist() == [9 - r // 100 for r in range(1000)]


def test_a_training_notes_where_its_weights_are(examples, tmp_path: Path) -> None:
    schema = examples.schema()
    frame = examples.frame(schema, 1500).with_columns(word=(pl.col("word") ** 2 // 4000).cast(pl.Int32))
    stream = examples.stream(schema, frame, tmp_path / "x.parquet", 100, shuffle=True)
    sparsity = Sparsity(density=0.5, schedule=Schedule(interval=5, window=3, fraction=0.5, redistribute=1.0))
    config = TrainConfig(batch_size=100, epochs=3, threads=1)
    trained = train(AUTOINT, schema, stream, None, config, tmp_path / "training", sparsity=sparsity)
    counts = stream.row_counts()
    model = load_model(AUTOINT, schema, trained.weights, where=tmp_path, sparsity=sparsity)
    found = describe(model, counts)
    assert found is not None
    rows = {t.name: t.rows for t in found.tables}
    for entry in trained.history:
        assert sum(entry[f"density.{name}"] * rows[name] * 8 for name in rows) == pytest.approx(found.budget)
    assert trained.history[0] != trained.history[-1]
    last = trained.history[-1]
    assert {t.name: t.density for t in found.tables} == pytest.approx({n: last[f"density.{n}"] for n in rows})
    for i in range(TENTHS):
        mine = [t.tenths[i] for t in found.tables if t.tenths]
        density = sum(x.active for x in mine) / sum(x.rows for x in mine) / 8
        assert last[f"density_tenth.{i + 1}"] == pytest.approx(density)
    assert last["density_tenth.1"] > 1.2 * last["density_tenth.10"]


def test_even_rows_and_dense_tables_note_no_tenths(examples) -> None:
    tables = tables_in(build_model(AUTOINT, examples.schema(), sparsity=UNEVEN))
    noted = Watch.over(tables, None).densities()
    assert set(noted) == {"density.word", "density.tags", "density.type"}
    counts = {f.name: torch.ones(f.rows, dtype=torch.int64) for f in examples.schema().sparse}
    assert len(Watch.over(tables, counts).densities()) == 3 + TENTHS


SIZES = (10, 50, 250, 1000)


def signal_and_noise(seed: int, rows: int) -> tuple[Schema, pl.DataFrame]:
    """For each number of ids a field that decides clicks and one that does not, equally skewed."""
    rng = np.random.default_rng(seed)
    columns: dict[str, pl.Series] = {}
    logit_N = np.full(rows, -1.0)
    for size in SIZES:
        for kind in ("signal", "noise"):
            ids_N = (size * rng.random(rows) ** 2).astype(np.int32)
            columns[f"{kind}{size}"] = pl.Series(ids_N)
            if kind == "signal":
                logit_N += rng.normal(0, 0.7, size)[ids_N]
    clicks_N = rng.random(rows) < 1 / (1 + np.exp(-logit_N))
    columns[carried("click")] = pl.Series(clicks_N.astype(np.int8))
    sparse = tuple(Sparse(name=f"{kind}{size}", rows=size) for size in SIZES for kind in ("signal", "noise"))
    return Schema(keys=(), dense=(), sparse=sparse, labels=("click",)), pl.DataFrame(columns)


@pytest.mark.parametrize("seed", [0, 1])
def test_noise_ranks_below_signal(seed: int, examples, tmp_path: Path) -> None:
    schema, frame = signal_and_noise(seed, 20_000)
    stream: ExampleStream = examples.stream(schema, frame, tmp_path / "x.parquet", 256, shuffle=True)
    sparsity = Sparsity(density=0.25, schedule=Schedule(interval=10, window=5, redistribute=1.0))
    config = TrainConfig(batch_size=256, epochs=1, threads=1, seed=seed)
    model = DCNConfig(dim=16)
    trained = train(model, schema, stream, None, config, tmp_path / "training", sparsity=sparsity)
    found = describe(load_model(model, schema, trained.weights, where=tmp_path, sparsity=sparsity), stream.row_counts())
    assert found is not None
    assert kinds(found) == ["signal"] * 4 + ["noise"] * 4
    # Sums of magnitudes compare fields of as many rows; they grow with them.
    sums = {s.field: s.magnitude for s in found.strengths()}
    assert all(sums[f"signal{size}"] > sums[f"noise{size}"] for size in SIZES)
    assert sums["noise1000"] > sums["signal10"]


def kinds(found: Description) -> Sequence[str]:
    return [s.field.rstrip("0123456789") for s in found.strengths()]
