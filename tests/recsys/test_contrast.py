"""The self-supervised task: what features tell of each other, what views see, what is drawn, and how it trains."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from base.config import parse_config
from base.errors import ConfigError, DataError
from features.schema import Dense, Schema, Sparse
from recsys import checkpoint, processes
from recsys.bundle import load_model
from recsys.checkpoint import WarmStart
from recsys.contrast.config import SelfSupervision
from recsys.contrast.corpus import Corpus, Items
from recsys.contrast.information import BINS, mutual_information
from recsys.contrast.task import SelfTask, drop_features
from recsys.data import ExampleStream
from recsys.device import CPU
from recsys.distributed import reset_tables, shard
from recsys.models import AutoIntConfig, ModelConfig, build_model
from recsys.models.esmm import ESMMConfig
from recsys.models.fm import FMConfig
from recsys.models.lr import LRConfig
from recsys.models.two_tower import TwoTower, TwoTowerConfig
from recsys.network import MLPTower
from recsys.sparsity.config import Schedule, Sparsity
from recsys.trainer import Progress, TrainConfig, Trained, train
from tests.marks import quick

ITEM = ("brand", "price", "tags", "kind")
SCHEMA = Schema(
    keys=(),
    dense=(Dense(name="age"), Dense(name="price")),
    sparse=(
        Sparse(name="user", rows=30),
        Sparse(name="id", rows=50),
        Sparse(name="tags", rows=9, multi=True),
        Sparse(name="brand", rows=7),
        Sparse(name="kind", rows=4),
    ),
    labels=("click",),
    item="id",
)
TWO_TOWER = TwoTowerConfig(query=("user", "age"), item=ITEM, dim=8, item_hidden=(12,), dropout=0.1)
AUTOINT = AutoIntConfig(dim=8, layers=1, heads=1, attention_dim=4)
FUNNEL = SCHEMA.model_copy(update={"labels": ("click", "buy"), "funnel": ("click", "buy")})
ESMM = ESMMConfig(dim=8, tower=MLPTower(hidden=(8,)), shared_embeddings=False)
FAST = TrainConfig(batch_size=40, epochs=2, learning_rate=0.01, table_learning_rate=0.1, threads=1)


def item_frame(rows: int, seed: int = 0) -> pl.DataFrame:
    """Brand and kind go together; tags say something of both, price nothing."""
    rng = np.random.default_rng(seed)
    brand = rng.integers(0, 7, rows)
    tags = [
        sorted({int(b) % 3, *rng.integers(0, 9, n).tolist()}) if n else []
        for b, n in zip(brand, rng.integers(0, 3, rows), strict=True)
    ]
    return pl.DataFrame(
        {
            "id": pl.Series(np.arange(rows) % 50, dtype=pl.Int32),
            "brand": pl.Series(brand, dtype=pl.Int32),
            "kind": pl.Series((brand + (rng.random(rows) < 0.1)) % 4, dtype=pl.Int32),
            "tags": pl.Series(tags, dtype=pl.List(pl.Int32)),
            "price": pl.Series(rng.normal(size=rows), dtype=pl.Float32),
        }
    )


def written(folder: Path, frame: pl.DataFrame, name: str, schema: Schema = SCHEMA, **settings: Any) -> ExampleStream:
    folder.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(folder / name, row_group_size=200)
    return ExampleStream((folder / name,), schema, 40, **settings)


def corpus_of(folder: Path, frame: pl.DataFrame, item: Sequence[str] = ITEM, **settings: Any) -> Corpus:
    """Items as a ranking has them: a row for each."""
    parsed = parse_config(SelfSupervision, settings, source="test")
    return Corpus(parsed, written(folder, frame, "items.parquet"), tuple(item), distinct=False)


def items_of(folder: Path, frame: pl.DataFrame, size: int = 64, **settings: Any) -> Items:
    item = settings.pop("item", ITEM)
    return Items(corpus_of(folder, frame, item, **settings), SCHEMA, size, 5)


# --- mutual information -----------------------------------------------------------------------------------------------


def presences(frame: pl.DataFrame, name: str) -> list[list[Any]]:
    """A column as variables: itself, the part that a number falls in, or whether each value is there."""
    column = frame[name]
    if column.dtype == pl.List(pl.Int32):
        rows = column.to_list()
        return [[v in row for row in rows] for v in sorted({v for row in rows for v in row})]
    if column.dtype == pl.Float32:
        values = column.to_numpy()
        return [[int((values < v).sum()) * BINS // len(values) for v in values]]
    return [column.to_list()]


def told(a: list[Any], b: list[Any]) -> float:
    """Σ P(a, b) log P(a, b) / P(a) P(b)."""
    both, of_a, of_b = Counter(zip(a, b, strict=True)), Counter(a), Counter(b)
    return sum(n / len(a) * np.log(n * len(a) / of_a[x] / of_b[y]) for (x, y), n in both.items())


@pytest.mark.parametrize("rows", [3, 150])
def test_mutual_information_is_that_of_counting(rows: int) -> None:
    frame = item_frame(rows, seed=rows).with_columns(
        more=pl.Series([[1], [1, 1, 3], []] * (rows // 3), dtype=pl.List(pl.Int32))
    )
    names = ("brand", "price", "tags", "kind", "more", "id")
    known = {f.name: f for f in (*SCHEMA.sparse, *SCHEMA.dense, Sparse(name="more", rows=4, multi=True))}
    found = mutual_information(frame, [known[n] for n in names])
    for (i, a), (j, b) in product(enumerate(names), repeat=2):
        pairs = [told(x, y) for x in presences(frame, a) for y in presences(frame, b)]
        assert found[i, j] == pytest.approx(0.0 if a == b else np.mean(pairs), abs=1e-12), (a, b)
    shuffled = frame.sample(fraction=1, shuffle=True, seed=1)
    assert (mutual_information(shuffled, [known[n] for n in names]) == found).all()


def test_a_field_without_values_tells_nothing() -> None:
    frame = item_frame(20).with_columns(tags=pl.Series([[]] * 20, dtype=pl.List(pl.Int32)), kind=pl.lit(1))
    fields = [f for f in SCHEMA.sparse if f.name in ("brand", "tags", "kind")]
    assert (mutual_information(frame, fields) == 0).all()


# --- masks ------------------------------------------------------------------------------------------------------------


def test_correlated_masks_are_a_seed_and_what_tells_most_about_it(tmp_path: Path) -> None:
    frame = item_frame(300)
    fields = ("brand", "price", "tags", "kind", "id")
    items = items_of(tmp_path, frame, item=fields, masking="cfm")
    information = mutual_information(frame, items.fields)
    allowed = {
        frozenset({seed, *sorted((i for i in range(5) if i != seed), key=lambda i: -information[seed, i])[: 5 // 2]})
        for seed in range(5)
    }
    found = Counter(frozenset(np.flatnonzero(items.batch(step).masked_2S[0].numpy()).tolist()) for step in range(400))
    assert found.keys() == allowed
    assert len(allowed) > 2


def test_random_masks_are_as_large_and_any(tmp_path: Path) -> None:
    items = items_of(tmp_path, item_frame(60), masking="rfm")
    found = Counter(tuple(items.batch(step).masked_2S[0].tolist()) for step in range(400))
    assert {sum(mask) for mask in found} == {1 + 4 // 2}
    assert len(found) == 4
    assert min(found.values()) > 70


@pytest.mark.parametrize("masking", ["cfm", "rfm"])
@pytest.mark.parametrize(("width", "masked"), [(2, 1), (3, 2), (4, 3)])
def test_neither_view_is_without_any_feature(width: int, masked: int, masking: str, tmp_path: Path) -> None:
    items = items_of(tmp_path, item_frame(60), item=ITEM[:width], masking=masking)
    for step in range(50):
        first, second = items.batch(step).masked_2S
        assert int(first.sum()) == masked
        assert second.equal(~first)


@pytest.mark.parametrize("masking", ["cfm", "rfm"])
@pytest.mark.parametrize(("masked", "expected"), [(None, 3), (1, 2), (2, 3)])
def test_hidden_features_are_in_neither_view_and_lead_to_no_other(
    masked: int | None, expected: int, masking: str, tmp_path: Path
) -> None:
    """So many are masked beside the one drawn, or half of what views may see."""
    frame, fields = item_frame(300), ("brand", "id", "price", "tags", "kind")
    items = items_of(tmp_path, frame, item=fields, masking=masking, hidden=["id"], masked=masked)
    information = mutual_information(frame, [f for f in items.fields if f.name != "id"])
    found: set[frozenset[int]] = set()
    for step in range(200):
        first, second = (np.flatnonzero(x).tolist() for x in items.batch(step).masked_2S)
        assert set(first) & set(second) == {1}
        assert len(first) == expected + 1
        assert len(first) + len(second) == len(fields) + 1
        found.add(frozenset(i - (i > 1) for i in first if i != 1))
    if masking == "cfm":
        others = {seed: sorted(set(range(4)) - {seed}, key=lambda i: -information[seed, i]) for seed in range(4)}
        assert found == {frozenset([seed, *others[seed][: expected - 1]]) for seed in range(4)}
    else:
        assert len(found) == (6 if expected == 2 else 4)


def test_items_that_differ_in_what_is_hidden_alone_are_no_negatives_of_each_other(tmp_path: Path) -> None:
    frame = pl.concat([item_frame(3), item_frame(3).with_columns(id=pl.lit(9, pl.Int32))])
    for hidden, expected in ((["id"], 3), ([], 6)):
        settings = {"item": ("id", *ITEM), "eliminate_false_negatives": True, "hidden": hidden}
        assert len(items_of(tmp_path, frame, **settings).batch(0).ids_N.unique()) == expected


@pytest.mark.parametrize("hidden", [[], ["row"]])
def test_features_may_be_called_anything(hidden: list[str], tmp_path: Path) -> None:
    """As our own columns of counts are."""
    names = {"brand": "a", "kind": "b", "tags": "both", "price": "len", "id": "row"}
    named = {"dense": SCHEMA.dense, "sparse": SCHEMA.sparse}
    fields = {n: tuple(f.model_copy(update={"name": names.get(f.name, f.name)}) for f in fs) for n, fs in named.items()}
    schema, frame = SCHEMA.model_copy(update=fields), item_frame(60)
    settings: dict[str, Any] = {"eliminate_false_negatives": True, "hidden": hidden}
    known = {new: old for old, new in names.items()}
    plain = items_of(tmp_path / "plain", frame, item=names, **{**settings, "hidden": [known[n] for n in hidden]})
    stream = written(tmp_path, frame.rename(names), "items.parquet", schema)
    corpus = Corpus(parse_config(SelfSupervision, settings, source="test"), stream, (*names.values(),), distinct=False)
    items = Items(corpus, schema, 64, 5)
    for step in range(4):
        one, other = items.batch(step), plain.batch(step)
        assert one.masked_2S.equal(other.masked_2S)
        assert one.ids_N.equal(other.ids_N)


# --- batches ----------------------------------------------------------------------------------------------------------


def test_items_are_drawn_uniformly_and_by_the_step(tmp_path: Path) -> None:
    """Whatever their popularity, which the corpus does not tell; and each at most once a batch."""
    items = items_of(tmp_path, item_frame(100), size=20)
    drawn = np.zeros(100)
    for step in range(1500):
        ids = items.batch(step).ids_N.numpy()
        assert len(set(ids)) == len(ids) == 20
        drawn[ids] += 1
    expected = 1500 * 20 / 100
    assert ((drawn - expected) ** 2 / expected).sum() / 0.8 < 149  # chi-square of 99, p = 0.001; drawn without return
    assert items.batch(7).ids_N.equal(items.batch(7).ids_N)
    assert not items.batch(7).ids_N.equal(items.batch(8).ids_N)
    other = Items(corpus_of(tmp_path, item_frame(100)), SCHEMA, 20, 6)
    assert not items.batch(7).ids_N.equal(other.batch(7).ids_N)
    small = items_of(tmp_path, item_frame(100), batch_size=12)
    assert len(small.batch(0).ids_N) == 12
    all_ = items_of(tmp_path, item_frame(10))
    assert sorted(all_.batch(0).ids_N.tolist()) == list(range(10))


def test_examples_are_the_items_and_nothing_else(tmp_path: Path) -> None:
    frame = item_frame(80)
    batch = items_of(tmp_path, frame, value_dropout=0.0).batch(3)
    rows, jagged = batch.ids_N.tolist(), batch.rows.sparse
    assert jagged.keys() == [f.name for f in SCHEMA.sparse]
    for name in ("brand", "kind"):
        assert jagged[name].values().tolist() == frame[name][rows].to_list()
    bags = [bag.tolist() for bag in jagged["tags"].to_dense()]
    assert bags == [sorted(bag) for bag in frame["tags"][rows].to_list()]
    assert any(not bag for bag in bags)
    assert not len(jagged["user"].values())
    assert not len(jagged["id"].values())
    assert batch.rows.dense_BN[:, 1].tolist() == pytest.approx(frame["price"][rows].to_list())
    assert batch.rows.dense_BN[:, 0].eq(0).all()
    assert len(batch.rows) == len(rows)


def test_single_values_are_dropped_from_bags_alone(tmp_path: Path) -> None:
    frame = item_frame(400)
    items = items_of(tmp_path, frame, size=400, value_dropout=0.3)
    kept = there = 0
    for step in range(5):
        batch = items.batch(step)
        assert len(batch.rows.sparse["brand"].values()) == 400
        for row, bag in zip(batch.ids_N.tolist(), batch.rows.sparse["tags"].to_dense(), strict=True):
            assert set(bag.tolist()) <= set(frame["tags"][row].to_list())
            kept, there = kept + len(bag), there + len(frame["tags"][row])
    assert kept / there == pytest.approx(0.7, abs=0.02)


def test_without_masking_each_view_drops_values_of_its_own(tmp_path: Path) -> None:
    items = items_of(tmp_path, item_frame(200), size=200, masking="none", value_dropout=0.5)
    batch = items.batch(0)
    assert len(batch.rows) == 400
    brand, bags = batch.rows.sparse["brand"].values(), batch.rows.sparse["tags"].to_dense()
    assert brand[:200].equal(brand[200:])
    assert any(not a.equal(b) for a, b in zip(bags[:200], bags[200:], strict=True))
    assert not batch.masked_2S.any()


def test_a_logs_corpus_is_its_distinct_items(tmp_path: Path) -> None:
    """An order within a bag makes no other item, nor does a popular one count more."""
    frame = item_frame(5)
    turned = frame.with_columns(pl.col("tags").list.reverse())
    log = pl.concat([frame, frame[:1], frame[:1], turned, frame[3:]]).drop("id")
    corpus = replace(corpus_of(tmp_path, log), distinct=True)
    expected = frame.select(ITEM).unique(maintain_order=True)
    assert corpus.frame().equals(expected)
    assert replace(corpus, distinct=False).frame().height == log.height
    with pytest.raises(DataError, match=r"corpus of \[ssl\] has no items"):
        corpus_of(tmp_path, frame.clear()).frame()


# --- the loss ---------------------------------------------------------------------------------------------------------


class Linear(torch.nn.Module):
    """In the place of a tower: what it saw, and the sum of the fields."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def vectors(self, e_BSD: Tensor) -> Tensor:
        self.seen.append(e_BSD)
        return e_BSD.sum(1)


def task_of(folder: Path, frame: pl.DataFrame, **settings: Any) -> tuple[SelfTask, TwoTower, Linear]:
    torch.manual_seed(0)
    model = build_model(TWO_TOWER, SCHEMA)
    assert isinstance(model, TwoTower)
    tower = model.item = Linear()  # pyright: ignore[reportAttributeAccessIssue]
    return SelfTask(corpus_of(folder, frame, **settings), model, SCHEMA, 24, 5), model, tower


def by_numpy(first: Any, second: Any, ids: list[int], temperature: float) -> float:
    first, second = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (first, second))
    total = 0.0
    for i, z in enumerate(first):
        others = [j for j in range(len(ids)) if j == i or ids[j] != ids[i]]
        similar = np.exp([z @ second[j] / temperature for j in others])
        total -= np.log(np.exp(z @ second[i] / temperature) / similar.sum())
    return total / len(ids)


@pytest.mark.parametrize("masking", ["cfm", "rfm"])
def test_the_views_see_complementary_features_and_the_loss_is_equation_3(masking: str, tmp_path: Path) -> None:
    task, model, tower = task_of(tmp_path, item_frame(60), masking=masking, temperature=0.2)
    for step in range(4):
        tower.seen.clear()
        loss = task.loss(model, step, CPU)
        first, second = (x.detach() for x in tower.seen)
        batch = task.items.batch(step)
        whole = model.embedded(batch.rows)[:, [model.fields.index(n) for n in ITEM]]
        assert task.default_CSD is not None
        for i, masked in enumerate(batch.masked_2S[0].tolist()):
            hidden, shown = (first, second) if masked else (second, first)
            assert hidden[:, i].equal(task.default_CSD[0, i].expand(24, -1))
            assert shown[:, i].equal(whole[:, i])
        z, other = (x.sum(1).double().numpy() for x in (first, second))
        assert loss.item() == pytest.approx(by_numpy(z, other, list(range(24)), 0.2), rel=1e-5)


@pytest.mark.parametrize("masking", ["cfm", "none"])
def test_a_hidden_feature_is_shown_to_neither_tower(masking: str, tmp_path: Path) -> None:
    task, model, tower = task_of(tmp_path, item_frame(60), masking=masking, hidden=["brand"])
    task.loss(model, 0, CPU).backward()
    assert task.default_CSD is not None
    for seen in tower.seen:
        assert seen[:, 0].equal(task.default_CSD[0, 0].expand(24, -1))
        assert not seen[:, 1:].equal(task.default_CSD[0, 1:].expand(24, -1, -1))


def test_numbers_of_embeddings_are_masked_for_each_item_and_view(tmp_path: Path) -> None:
    task, model, tower = task_of(tmp_path, item_frame(60), masking="none", value_dropout=0.0, embedding_masking=0.25)
    task.loss(model, 0, CPU)
    first, second = tower.seen
    assert task.default_CSD is None
    assert not dict(task.named_parameters())
    zero = [x == 0 for x in (first, second)]
    assert not zero[0].equal(zero[1])
    filled = model.embedded(task.items.batch(0).rows)[:, [model.fields.index(n) for n in ITEM]] != 0
    for masked in zero:
        assert masked[filled].float().mean().item() == pytest.approx(0.25, abs=0.05)
        assert len({tuple(row.flatten().tolist()) for row in masked}) == 24


def test_spreading_out_compares_items_as_they_are(tmp_path: Path) -> None:
    task, model, tower = task_of(tmp_path, item_frame(60), baseline="spread_out")
    loss = task.loss(model, 0, CPU)
    (seen,) = tower.seen
    z = seen.detach().sum(1).double().numpy()
    assert loss.item() == pytest.approx(by_numpy(z, z, list(range(24)), 0.1), rel=1e-5)
    assert len(task.items.batch(0).rows) == 24


def test_items_with_the_same_features_are_no_negatives_if_asked(tmp_path: Path) -> None:
    twins = pl.concat([item_frame(6)] * 4)
    for eliminate in (False, True):
        task, model, tower = task_of(tmp_path, twins, eliminate_false_negatives=eliminate, value_dropout=0.0)
        loss = task.loss(model, 1, CPU)
        rows = np.random.default_rng((5, 1, 0x55)).choice(24, 24, replace=False)
        first, second = (x.detach().sum(1).double().numpy() for x in tower.seen)
        ids = (rows % 6 if eliminate else rows).tolist()
        assert loss.item() == pytest.approx(by_numpy(first, second, ids, 0.1), rel=1e-5)


@pytest.mark.parametrize("eliminate", [False, True])
def test_a_batch_of_one_item_and_items_without_features_break_nothing(eliminate: bool, tmp_path: Path) -> None:
    same = pl.concat([item_frame(1)] * 30)
    empty = same.with_columns(
        tags=pl.Series([[]] * 30, dtype=pl.List(pl.Int32)),
        brand=pl.lit(0, pl.Int32),
        kind=pl.lit(0, pl.Int32),
        price=pl.lit(0.0, pl.Float32),
    )
    for frame in (same, empty, item_frame(1)):
        corpus = corpus_of(tmp_path, frame, eliminate_false_negatives=eliminate, value_dropout=0.0)
        model = build_model(TWO_TOWER, SCHEMA)
        task = SelfTask(corpus, model, SCHEMA, 24, 5)
        loss = task.loss(model.eval(), 0, CPU)
        loss.backward()
        alone = eliminate or frame.height == 1
        assert loss.item() == pytest.approx(0.0 if alone else np.log(24), abs=1e-5)
        grads = [p.grad for p in (*model.parameters(), *task.parameters()) if p.grad is not None]
        assert grads
        assert all(g.isfinite().all() and g.abs().max() < 1e-4 for g in grads)


def test_ranking_models_are_taught_by_their_item_features(tmp_path: Path) -> None:
    """Copies of the embeddings, one for each task, all take part; nothing else gets a gradient."""
    model = build_model(ESMM, FUNNEL)
    corpus = corpus_of(tmp_path, item_frame(60), projection=[10, 6])
    task = SelfTask(corpus, model, FUNNEL, 24, 5)
    assert task.default_CSD is not None
    assert task.default_CSD.shape == (2, 4, 8)
    loss = task.loss(model, 0, CPU)
    loss.backward()
    touched = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    tables = {f"embed.tables.embedding_bags.{f}@{t}.weight" for f in ("brand", "tags", "kind") for t in FUNNEL.labels}
    assert touched == tables | {"embed.numeric_ND"}
    assert all(p.grad is not None and p.grad.any() for p in task.parameters())


# --- training ---------------------------------------------------------------------------------------------------------


def log(rows: int, schema: Schema) -> pl.DataFrame:
    rng = np.random.default_rng(1)
    found = item_frame(60).with_columns(id=pl.int_range(60, dtype=pl.Int32) % 50)[rng.integers(0, 60, rows)]
    labels = {f"@{n}": pl.Series(rng.integers(0, 2, rows), dtype=pl.Int8) for n in schema.labels}
    if "@buy" in labels:
        labels["@buy"] = labels["@buy"] * labels["@click"]
    return found.with_columns(
        user=pl.Series(rng.integers(0, 30, rows), dtype=pl.Int32),
        age=pl.Series(rng.normal(size=rows), dtype=pl.Float32),
        **labels,
    )


class InterruptionError(Exception):
    pass


CASES: dict[str, tuple[ModelConfig, Schema]] = {
    "two_tower": (TWO_TOWER, SCHEMA),
    "autoint": (AUTOINT, SCHEMA),
    "esmm": (ESMM, FUNNEL),
}
SPARSE = Sparsity(density=0.5, schedule=Schedule(interval=4, window=3))
VARIANTS: dict[str, dict[str, Any]] = {
    "cfm": {"embedding_masking": 0.1, "eliminate_false_negatives": True},
    "none": {"masking": "none"},
    "spread_out": {"baseline": "spread_out"},
    "feature_dropout": {"baseline": "feature_dropout"},
}


def run(
    name: str,
    folder: Path,
    ssl: dict[str, Any] | None,
    *,
    rows: int = 300,
    stop_at: int | None = None,
    **settings: Any,
) -> tuple[Trained, Schema]:
    model, schema = CASES[name]
    fit = written(folder / "data", log(rows, schema), "log.parquet", schema, shuffle=True, seed=4)
    corpus = None
    if ssl is not None:
        parsed = parse_config(SelfSupervision, {"batch_size": 25, **ssl}, source="test")
        two_tower = name == "two_tower"
        stream = written(folder / "data", item_frame(60), "items.parquet") if two_tower else fit
        corpus = Corpus(parsed, stream, ITEM, distinct=not two_tower)

    def on_step(progress: Progress) -> None:
        if progress.step == stop_at:
            raise InterruptionError

    counts = np.arange(50)
    config = settings.pop("config", FAST)
    options: dict[str, Any] = {"item_counts": counts, "corpus": corpus, "on_step": on_step, **settings}
    return train(model, schema, fit, None, config, folder / "state", **options), schema


KILLED = {
    f"{name}-{variant}{' of sparse tables' if sparsity else ''}": (name, variant, sparsity)
    for name in CASES
    for variant, sparsity in (*((variant, None) for variant in VARIANTS), ("cfm", SPARSE))
}


@pytest.mark.parametrize(("name", "variant", "sparsity"), quick(
    KILLED,
    *("two_tower-cfm", "two_tower-feature_dropout", "autoint-none", "autoint-cfm of sparse tables"),
    *("esmm-cfm", "esmm-spread_out"),
))  # fmt: skip
def test_killed_it_goes_on_bit_for_bit_and_the_bundle_is_as_without(
    name: str, variant: str, sparsity: Sparsity | None, tmp_path: Path
) -> None:
    config = FAST.model_copy(update={"checkpoint_every": 3})
    settings: dict[str, Any] = {"sparsity": sparsity, "config": config}
    ssl = VARIANTS[variant]
    whole, schema = run(name, tmp_path / "whole", ssl, **settings)
    for step in (5, 11):
        with pytest.raises(InterruptionError):
            run(name, tmp_path / "killed", ssl, stop_at=step, **settings)
    resumed, _ = run(name, tmp_path / "killed", ssl, **settings)
    assert resumed.resumed_at in (8, 11)
    assert resumed.history == whole.history
    assert whole.weights.keys() == resumed.weights.keys()
    assert all(whole.weights[n].equal(tensor) for n, tensor in resumed.weights.items())
    without, _ = run(name, tmp_path / "without", None, **settings)
    assert without.weights.keys() == whole.weights.keys()
    assert any(not whole.weights[n].equal(tensor) for n, tensor in without.weights.items())
    load_model(CASES[name][0], schema, whole.weights, where=tmp_path, sparsity=sparsity)
    told_of = ["self_loss" in entry for entry in whole.history]
    assert told_of == [variant != "feature_dropout"] * 2
    if variant != "feature_dropout":
        assert all(0 < entry["self_loss"] < 1.1 * np.log(25) for entry in whole.history)


TOLD_APART = {key: of[:2] for key, of in KILLED.items() if of[1] != "feature_dropout" and of[2] is None}


@pytest.mark.parametrize(
    ("name", "variant"), quick(TOLD_APART, "two_tower-cfm", "two_tower-spread_out", "autoint-none", "esmm-cfm")
)
def test_items_are_told_apart_ever_better(name: str, variant: str, tmp_path: Path) -> None:
    config = FAST.model_copy(update={"epochs": 8})
    trained, _ = run(name, tmp_path, {**VARIANTS[variant], "alpha": 3.0}, config=config)
    first, *_, last = (entry["self_loss"] for entry in trained.history)
    assert last < 0.95 * first


@pytest.mark.parametrize("name", CASES)
def test_both_losses_reach_what_both_use(name: str, tmp_path: Path) -> None:
    """Gradients are those of the plain model, though the task's lookup passes by the wrapper of the sharded one."""
    config, schema = CASES[name]
    config = config.model_copy(update={"dropout": 0.0}) if name == "two_tower" else config
    torch.manual_seed(1)
    model = build_model(config, schema, table_device="meta")
    sharded = shard(model, CPU, {"lr": 0.0, "eps": 1e-8}, batch_size=40)
    reset_tables(sharded, 3)
    weights = {n: t.clone() for n, t in checkpoint.weights(sharded).items()}
    plain = load_model(config, schema, weights, where=tmp_path).train()
    task = SelfTask(corpus_of(tmp_path, item_frame(60), value_dropout=0.0), model, schema, 24, 5)
    batch = next(written(tmp_path, log(40, schema), "log.parquet", schema).epoch(0))
    modules: list[tuple[Any, Any]] = [(plain, plain), (model, sharded.module)]
    for one, module in modules:
        if isinstance(one, TwoTower):
            one.count_items(torch.arange(50))
        (one.loss(module(batch), batch.labels_BT) + 2 * task.loss(one, 0, CPU)).backward()
    expected = dict(plain.named_parameters())
    assert len(sharded.dense) > 2
    for parameter, found in sharded.dense.items():
        grad = expected[parameter].grad
        assert grad is not None
        torch.testing.assert_close(found.grad, grad, atol=1e-6, rtol=1e-4)
    for table, place in sharded.tables.items():
        grad = expected[checkpoint.TABLE.format(table)].grad
        assert grad is not None
        assert (place.state_R > 0).equal(grad.any(1)), table


def test_the_loss_told_is_main_plus_alpha_times_self(tmp_path: Path) -> None:
    """At the first step, before anything has moved: the main task draws as it would without."""
    losses: dict[float, tuple[float, float]] = {}
    once: dict[str, Any] = {"config": FAST.model_copy(update={"epochs": 1}), "rows": 40}
    for alpha in (0.5, 2.0):
        (trained, _) = run("two_tower", tmp_path / str(alpha), {"alpha": alpha}, **once)
        losses[alpha] = (trained.history[0]["train_loss"], trained.history[0]["self_loss"])
    (without, _) = run("two_tower", tmp_path / "without", None, **once)
    assert without.history[0]["step"] == 1
    main = without.history[0]["train_loss"]
    for alpha, (total, own) in losses.items():
        assert total == pytest.approx(main + alpha * own, rel=1e-5)


def test_rows_that_the_log_never_shows_learn_from_the_corpus(tmp_path: Path) -> None:
    """A brand of items that nobody has looked at, drawn as often as any."""
    folder = tmp_path / "data"
    fit = written(folder, log(300, SCHEMA).with_columns(brand=pl.lit(1, pl.Int32)), "log.parquet", shuffle=True)
    corpus = Corpus(SelfSupervision(), written(folder, item_frame(60), "items.parquet"), ITEM, distinct=False)
    options: dict[str, Any] = {"item_counts": np.arange(50), "corpus": corpus}
    trained = train(TWO_TOWER, SCHEMA, fit, None, FAST, tmp_path / "state", **options)
    without = train(TWO_TOWER, SCHEMA, fit, None, FAST, tmp_path / "without", item_counts=np.arange(50))
    table = "embed.tables.embedding_bags.brand.weight"
    changed = (trained.weights[table] != without.weights[table]).any(1)
    assert changed.all()
    users = "embed.tables.embedding_bags.user.weight"
    assert (trained.weights[users] - without.weights[users]).abs().max() > 0  # by what they are compared with


@pytest.mark.parametrize("numbers", [True, False])
@pytest.mark.parametrize("sparsity", [None, Sparsity(density=0.5, schedule=Schedule(interval=1))])
def test_feature_dropout_drops_item_features_of_training_rows_alone(
    sparsity: Sparsity | None, numbers: bool, tmp_path: Path
) -> None:
    schema = SCHEMA if numbers else SCHEMA.model_copy(update={"dense": ()})
    model = build_model(AUTOINT, schema, sparsity=sparsity)
    fields = [f.name for f in (*schema.sparse, *schema.dense)]
    item = [name for name in ITEM if name in fields]
    corpus = corpus_of(tmp_path, item_frame(60), item, baseline="feature_dropout", dropout=0.3)
    drop_features(corpus, model, schema)
    batch = next(written(tmp_path, log(2000, schema), "log.parquet", schema).epoch(0))
    model.eval()
    whole = model.embed.separate(batch)
    model.train()
    torch.manual_seed(0)
    found = torch.cat([model.embed.separate(batch) for _ in range(50)])
    for i, name in enumerate(fields):
        there = whole[:, 0, i].repeat(50, 1)
        kept = (found[:, 0, i] == there).all(1)
        assert (kept | (found[:, 0, i] == 0).all(1)).all()
        dropped = 1 - kept[there.any(1)].float().mean().item()
        assert dropped == pytest.approx(0.3 if name in ITEM else 0.0, abs=0.04)
    drop_features(corpus_of(tmp_path, item_frame(60), item), model, schema)
    assert model.embed.separate(batch).equal(whole)


def test_going_on_from_a_state_takes_the_tasks_own_weights_with_it(tmp_path: Path) -> None:
    first, _ = run("autoint", tmp_path / "first", {})
    nothing_new = {f.name: np.zeros(0, dtype=np.int64) for f in SCHEMA.sparse}
    for ssl in ({}, None, {"baseline": "spread_out"}):
        trained, _ = run("autoint", tmp_path / f"{ssl}", ssl, warm=WarmStart(first.state, nothing_new))
        if ssl == {}:
            assert trained.history[0]["self_loss"] < first.history[0]["self_loss"]
    plain, _ = run("autoint", tmp_path / "plain", None)
    begun, _ = run("autoint", tmp_path / "begun", {}, warm=WarmStart(plain.state, nothing_new))
    assert begun.history[0]["self_loss"] > 0


def test_another_task_is_another_training(tmp_path: Path) -> None:
    run("autoint", tmp_path, {})
    one = checkpoint.stands_at(tmp_path / "state").run
    run("autoint", tmp_path, {"alpha": 0.2})
    two = checkpoint.stands_at(tmp_path / "state").run
    run("autoint", tmp_path, None)
    assert len({one, two, checkpoint.stands_at(tmp_path / "state").run}) == 3


# --- what cannot be meant ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "item", "message"),
    [
        ({}, ("brand",), 'ssl.masking = "cfm" .* see one alone of the item, \'brand\'; use masking = "none"'),
        ({"masking": "rfm"}, ("brand",), 'ssl.masking = "rfm" shares features out'),
        ({}, ("brand", "prize"), "ssl.item: 'prize' is no feature; did you mean 'price'"),
        ({"baseline": "feature_dropout"}, ("nothing",), "'nothing' is no feature; the features are user, id, tags"),
        ({}, ("brand", "kind", "brand"), "name each feature once"),
        ({"hidden": ["idd"]}, ("id", "brand", "kind"), "'idd' is no feature of the item; did you mean 'id'"),
        ({"hidden": ["price"]}, ("id", "brand"), "'price' is no feature of the item; they are id, brand"),
        ({"hidden": ["id"]}, ("id", "brand"), "which see one alone of the item, 'brand'"),
        ({"hidden": ["id"], "masking": "none"}, ("id",), "the views see nothing of the item"),
        ({"masked": 2}, ("id", "brand", "kind"), "ssl.masked = 2: of the 3 features .* use 1 at most"),
        ({"masked": 1, "hidden": ["id"]}, ("id", "brand", "kind"), "of the 2 features .* leave it out"),
    ],
)
def test_items_that_cannot_be_meant_are_refused(
    settings: dict[str, Any], item: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    corpus = replace(corpus_of(tmp_path, item_frame(60), **settings), item=item)
    fit = written(tmp_path, log(100, SCHEMA), "log.parquet")
    with pytest.raises(ConfigError, match=message):
        train(AUTOINT, SCHEMA, fit, None, FAST, tmp_path / "state", corpus=corpus)


def test_one_feature_is_enough_without_masking(tmp_path: Path) -> None:
    items = items_of(tmp_path, item_frame(60), item=("brand",), masking="none", embedding_masking=0.2)
    assert not items.batch(0).masked_2S.any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"masking": "none", "value_dropout": 0.0}, 'say baseline = "spread_out"'),
        ({"baseline": "spread_out", "masking": "rfm"}, "takes the place of views; leave ssl.masking or it out"),
        ({"baseline": "feature_dropout", "embedding_masking": 0.1}, "leave ssl.embedding_masking or it out"),
        ({"alpha": 0}, "alpha = 0: Input should be greater than 0"),
        ({"temperature": -1}, "temperature = -1: Input should be greater than 0"),
        ({"value_dropout": 1.0}, "value_dropout = 1.0: Input should be less than 1"),
        ({"item": []}, "item = "),
        ({"masking": "none", "masked": 2}, 'ssl.masked = 2: masking = "none" masks nothing'),
        ({"baseline": "spread_out", "hidden": ["id"]}, "leave ssl.hidden or it out"),
        ({"mask": "cfm"}, "unknown key mask"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(SelfSupervision, settings, source="test")


def test_models_without_vectors_and_several_processes_are_refused(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path, item_frame(60))
    fit = written(tmp_path, log(100, SCHEMA), "log.parquet")
    for model in (LRConfig(), FMConfig(dim=4)):
        with pytest.raises(ConfigError, match=f'model.name = "{model.name}" has no layers over embeddings'):
            train(model, SCHEMA, fit, None, FAST, tmp_path / "state", corpus=corpus)
    two = FAST.model_copy(update={"processes": 2})
    with pytest.raises(ConfigError, match=r"train.processes = 2: the task of \[ssl\] is trained by one process"):
        processes.train(AUTOINT, SCHEMA, fit, None, two, tmp_path / "state", corpus=corpus)
