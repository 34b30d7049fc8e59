"""Sparse tables: how weights are shared out, looked up, trained, and moved, each against brute force on dense ones."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType, SparseType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import BoundsCheckMode, EmbeddingLocation, PoolingMode
from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
)
from numpy.typing import NDArray
from torch import Tensor
from torchrec import KeyedJaggedTensor

import recsys.sparsity.schedule
from base.config import parse_config
from base.errors import ConfigError, IdError
from features.schema import Schema, Sparse
from recsys.device import CPU
from recsys.models import build_model
from recsys.models.fm import FMConfig
from recsys.sparsity import collect
from recsys.sparsity.collect import Collector, Seen
from recsys.sparsity.config import Schedule, Sparsity
from recsys.sparsity.layout import (
    UNIT,
    er_densities,
    even_sizes,
    even_total,
    popular_sizes,
    random_positions,
    sizes_for,
    slots_of,
)
from recsys.sparsity.schedule import Mover, _redistribute, move
from recsys.sparsity.tables import SparseTable, SparseTables, read_groups
from tests.recsys import expanded

Bags = Sequence[Sequence[int]]


def make(
    rows: Sequence[int],
    dim: int,
    density: float,
    *,
    kept: Sequence[int] = (),
    multi: Sequence[int] = (),
    counts: Sequence[Tensor] | None = None,
    accumulator: float = 0.0,
    lr: float = 0.1,
    schedule: dict[str, Any] | None = None,
    **settings: Any,
) -> SparseTables:
    """Tables t0, t1 … ready to train; those that are `kept` hold every weight, those that are `multi` take bags."""
    sparsity = Sparsity(density=density, schedule=Schedule(**({"window": 10} | (schedule or {}))), **settings)
    tables = [SparseTable(f"t{i}", f"f{i}", n, i in multi, i not in kept) for i, n in enumerate(rows)]
    made = SparseTables(tables, dim, sparsity, torch.device("meta"), 0.1)
    made.prepare({"lr": lr, "eps": 1e-8}, CPU)
    made.begin(3, accumulator, counts and {f"f{i}": c for i, c in enumerate(counts)})
    return made


def jagged(bags: Sequence[Bags]) -> KeyedJaggedTensor:
    """Of each table, a bag for each example."""
    return KeyedJaggedTensor(
        keys=[f"f{i}" for i in range(len(bags))],
        values=torch.tensor([n for table in bags for bag in table for n in bag], dtype=torch.int64),
        lengths=torch.tensor([len(bag) for table in bags for bag in table], dtype=torch.int32),
    )


def random_bags(tables: SparseTables, batch: int, rng: np.random.Generator) -> list[Bags]:
    """One id each, or up to four of them."""
    return [
        [rng.integers(0, t.rows, rng.integers(0, 5) if t.multi else 1).tolist() for _ in range(batch)]
        for t in tables.tables
    ]


def pooled(dense: Sequence[Tensor], bags: Sequence[Bags]) -> Tensor:
    """embedding_BTD by dense tables: the mean of each bag, 0 for an empty one."""
    return torch.stack(
        [
            torch.stack([table_RD[list(bag)].mean(0) if bag else torch.zeros(table_RD.shape[1]) for bag in of_table])
            for table_RD, of_table in zip(dense, bags, strict=True)
        ],
        dim=1,
    )


def a_window(rows: Sequence[int], sums_KD: Tensor) -> Seen:
    return Seen(torch.tensor(rows, dtype=torch.int64), sums_KD)


def whole(parts: dict[str, Tensor]) -> Tensor:
    return torch.cat(list(parts.values()))


def check_stored(tables: SparseTables) -> None:
    """Positions ascend, padding is empty, every row is where its number of weights says."""
    sizes_R, groups = read_groups(tables.tensors(), tables.dim, "here")
    assert sizes_R.equal(tables.sizes_R)
    assert sum(g.size * len(g) for g in groups) == tables.budget == int(sizes_R.sum(dtype=torch.int64))


# --- how weights are shared out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("unequal", [False, True])
@pytest.mark.parametrize(("dim", "density"), [(64, 0.1), (64, 0.05), (16, 0.25), (16, 0.3), (252, 0.99), (8, 0.6)])
def test_even_sizes_come_to_the_density_at_every_row(dim: int, density: float, unequal: bool) -> None:
    sizes_R = even_sizes(5000, dim, density, unequal=unequal)
    assert set(sizes_R.tolist()) <= set(sizes_for(dim, unequal=unequal))
    sums_R, numbers_R = np.cumsum(sizes_R, dtype=np.int64), np.arange(1, 5001)
    assert np.abs(sums_R - density * dim * numbers_R).max() < UNIT
    for rows in (1, 2, 999, 1000, 5000):
        assert even_total(rows, dim, density, unequal=unequal) == sums_R[rows - 1]
    assert even_sizes(1500, dim, density, unequal=unequal, first=3500).tolist() == sizes_R[3500:].tolist()
    assert sizes_R.max() - sizes_R.min() <= UNIT


def test_the_budget_is_the_density_to_the_weight() -> None:
    assert even_total(10_000_000, 64, 0.1, unequal=False) == 64_000_000
    assert even_total(1000, 16, 0.25, unequal=False) == 4000
    assert even_total(1000, 16, 0.03125, unequal=True) == 500
    assert even_sizes(3, 8, 1.0, unequal=False).tolist() == [8, 8, 8]
    assert even_sizes(3, 7, 1.0, unequal=False).tolist() == [7, 7, 7]
    assert set(even_sizes(1000, 1, 1.0, unequal=False)) == {1}
    assert set(even_sizes(1000, 64, 0.0624999999999, unequal=False)) <= {3, 4}


def test_a_density_just_below_a_size_is_that_size() -> None:
    assert set(even_sizes(1000, 64, (4 - 9e-10) / 64, unequal=False).tolist()) == {4}


def test_er_gives_small_tables_more() -> None:
    rows, dim, density = [10, 1000, 100_000], 16, 0.2
    found = er_densities(rows, dim, density)
    cells = np.array(rows) * dim
    assert np.dot(found, cells) == pytest.approx(density * cells.sum(), rel=1e-12)
    raw = np.array([1 / dim + 1 / r for r in rows])
    assert np.ptp(np.array(found) / raw) == pytest.approx(0, abs=1e-12)
    crowded = er_densities([1, 50, 1000], dim, 0.6)
    assert crowded[0] == 1
    assert np.dot(crowded, np.array([1, 50, 1000]) * dim) == pytest.approx(0.6 * 1051 * dim, rel=1e-12)
    assert crowded[1] / crowded[2] == pytest.approx((1 / dim + 1 / 50) / (1 / dim + 1 / 1000))
    assert er_densities([5, 7], dim, 1.0) == [1, 1]
    tables = make([10, 1000, 5000], dim, density, allocation="er")
    shares = [float(m.float().mean()) for m in expanded.masks(tables).values()]
    assert shares == pytest.approx(er_densities([10, 1000, 5000], dim, density), abs=UNIT / 160)
    assert abs(tables.budget - density * 6010 * dim) < 3 * UNIT


def test_popular_rows_have_weights_by_the_root_of_their_examples() -> None:
    rng = np.random.default_rng(0)
    counts_R = rng.zipf(1.3, 3000).clip(max=10**6)
    for total in (3000 * UNIT, 3000 * 6 // UNIT * UNIT, 3000 * 16):
        sizes_R = popular_sizes(counts_R, 32, total).astype(int)
        assert sizes_R.sum() == total
        assert sizes_R.min() == UNIT
        assert not (sizes_R % UNIT).any()
        order = np.argsort(-counts_R, kind="stable")
        assert (np.diff(sizes_R[order]) <= 0).all()
    between = (sizes_R > UNIT) & (sizes_R < 32)
    factor = sizes_R[between] / np.sqrt(counts_R[between])
    assert between.sum() > 20
    assert (np.abs(sizes_R[between] - np.median(factor) * np.sqrt(counts_R[between])) <= 2 * UNIT).all()
    scarce = popular_sizes(counts_R, 32, 1000 * UNIT)
    assert scarce.sum() == 1000 * UNIT
    assert counts_R[scarce == 0].max() <= counts_R[scarce > 0].min()
    unseen = popular_sizes(np.zeros(7), 8, 7 * 8)
    assert unseen.tolist() == [8] * 7


def test_popularity_shares_one_budget_over_tables(examples: Any) -> None:
    counts = [torch.tensor([0, 1, 2500, 3]), torch.arange(50) ** 2]
    tables = make([4, 50], 16, 0.5, allocation="popularity", counts=counts)
    assert tables.budget == even_total(4, 16, 0.5, unequal=True) + even_total(50, 16, 0.5, unequal=True)
    assert tables.sizes_R[2] > tables.sizes_R[0]
    assert tables.sizes_R[-1] > tables.sizes_R[4]
    check_stored(tables)
    kept = make([4, 50], 16, 0.5, allocation="popularity", counts=counts, kept=[0])
    assert kept.sizes_R[:4].tolist() == [16] * 4
    assert int(kept.sizes_R[4:].sum()) == even_total(50, 16, 0.5, unequal=True)


def test_random_positions_are_ascending_and_every_subset_as_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    found_KS = random_positions(40_000, 2, 5, generator)
    assert (found_KS[:, 0] < found_KS[:, 1]).all()
    _, counts = torch.unique(found_KS, dim=0, return_counts=True)
    assert len(counts) == 10
    assert float(((counts - 4000) ** 2 / 4000).sum()) < 27.9  # chi square, 9 degrees of freedom, p = 0.001
    for size, dim in ((1, 1), (7, 7), (24, 252), (251, 252)):
        rows_KS = random_positions(3000, size, dim, generator)
        assert rows_KS.shape == (3000, size)
        assert rows_KS.dtype == torch.uint8
        assert (rows_KS.int().diff(dim=1) > 0).all()
        share_D = torch.bincount(rows_KS.flatten().int(), minlength=dim) / 3000
        assert (share_D - size / dim).abs().max() < 0.05


def test_tables_begin_at_positions_and_weights_of_their_own() -> None:
    tables = make([4000, 4000], 32, 0.25)
    first, second = expanded.masks(tables).values()
    assert (first != second).any(1).float().mean() > 0.99
    assert (first.float().mean(0) - 0.25).abs().max() < 0.05
    values = whole(expanded.weights(tables))
    assert values[values != 0].std().item() == pytest.approx(0.1, rel=0.02)
    assert make([4000], 32, 0.25).tensors()["values.8"].equal(tables.tensors()["values.8"][:4000])
    nested = make([10], 32, 0.25, positions="nested")
    assert expanded.masks(nested)["t0"].equal((torch.arange(32) < 8).expand(10, -1))
    assert slots_of(1) == slots_of(4) == 4
    assert slots_of(5) == 8


# --- lookups ----------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "uniform": {"rows": [50, 7, 300], "dim": 16, "density": 0.3},
    "few": {"rows": [50, 7, 300], "dim": 16, "density": 0.14},
    "narrow": {"rows": [50, 7, 300], "dim": 3, "density": 0.7},
    "all": {"rows": [50, 7, 300], "dim": 12, "density": 1.0},
    "kept": {"rows": [50, 7, 300], "dim": 16, "density": 0.2, "kept": [1]},
    "er": {"rows": [50, 7, 300], "dim": 16, "density": 0.2, "allocation": "er"},
    "none in some rows": {
        "rows": [50, 7, 300],
        "dim": 16,
        "density": 0.1,
        "allocation": "popularity",
        "schedule": {"redistribute": 1.0},
        "counts": [torch.arange(50) ** 3, torch.arange(7) ** 6, torch.arange(300) ** 2],
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_lookup_is_the_mean_of_the_dense_rows(kind: str) -> None:
    rng = np.random.default_rng(0)
    tables = make(**KINDS[kind], multi=[1, 2])
    check_stored(tables)
    if kind == "none in some rows":
        assert 10 < (tables.sizes_R == 0).sum() < 340
    dense = [t.requires_grad_(True) for t in expanded.weights(tables).values()]
    for _ in range(2):
        bags = random_bags(tables, 40, rng)
        expected = pooled(dense, bags)
        with torch.no_grad():
            scored = tables(jagged(bags))
        torch.testing.assert_close(tables(jagged(bags)), expected, atol=1e-6, rtol=1e-5)
        assert scored.equal(tables(jagged(bags)))
    assert tables(jagged([[[0]], [[]], [[]]]))[0, 1:].eq(0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_collector_has_the_gradients_of_dense_tables(kind: str) -> None:
    """Of all weights, active or not, summed over the batches of a window; those of one table after another."""
    rng = np.random.default_rng(1)
    tables = make(**KINDS[kind], multi=[1, 2], lr=0.0)
    dense = [t.requires_grad_(True) for t in expanded.weights(tables).values()]
    tables.collector = Collector(10**6, tables.rows, 1, tables.dim)
    touched: set[int] = set()
    for _ in range(3):
        bags = random_bags(tables, 40, rng)
        up = torch.from_numpy(rng.normal(size=(40, 3, tables.dim))).float()
        (tables(jagged(bags)) * up).sum().backward()
        (pooled(dense, bags) * up).sum().backward()
        touched |= {s + n for s, of_table in zip(tables.starts, bags, strict=True) for bag in of_table for n in bag}
    assert tables.collector.seen().rows_K.tolist() == sorted(touched)
    expected = torch.cat([t.grad for t in dense if t.grad is not None])[tables.collector.seen().rows_K]
    torch.testing.assert_close(tables.collector.seen().sums_KD, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        tables(jagged(bags))
    assert tables.collector.seen().rows_K.tolist() == sorted(touched)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_may_look_up_twice(kind: str) -> None:
    """The collector sums both gradients; the kernels take both, as two steps of Adagrad on what each lookup had."""
    rng = np.random.default_rng(2)
    tables, collecting = (make(**KINDS[kind], multi=[1, 2], lr=lr) for lr in (0.1, 0.0))
    dense = [t.requires_grad_(True) for t in expanded.weights(collecting).values()]
    before, masks = expanded.weights(tables), expanded.masks(tables)
    collecting.collector = Collector(10**6, collecting.rows, 1, collecting.dim)
    both = [random_bags(tables, 40, rng), random_bags(tables, 25, rng)]
    up = [torch.from_numpy(rng.normal(size=(len(bags[0]), 3, tables.dim))).float() for bags in both]
    for own in (tables, collecting):
        sum((own(jagged(bags)) * u).sum() for bags, u in zip(both, up, strict=True)).backward()  # pyright: ignore
    grads: list[list[Tensor]] = []
    for bags, u in zip(both, up, strict=True):
        grads.append(list(torch.autograd.grad((pooled(dense, bags) * u).sum(), dense)))
    summed = torch.cat([a + b for a, b in zip(*grads, strict=True)])
    rows_K = collecting.collector.seen().rows_K
    torch.testing.assert_close(collecting.collector.seen().sums_KD, summed[rows_K], atol=1e-5, rtol=1e-5)
    assert summed.abs().sum(1).nonzero().squeeze(1).tolist() == rows_K.tolist()
    if tables.sparsity.state == "element":
        for i, table in enumerate(tables.tables):
            moved = expanded.sums(tables)[table.name]
            expected = (grads[0][i] ** 2 + grads[1][i] ** 2) * masks[table.name]
            torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-4)
    changed = torch.cat([(expanded.weights(tables)[n] != before[n]).any(1) for n in before])
    held = torch.cat([masks[n].any(1) for n in before])
    assert changed.equal((summed != 0).any(1) & held)


def test_a_batch_may_lack_what_is_not_of_it() -> None:
    """As a batch of items lacks users: no id, also where a feature has one in every example."""
    tables = make([5, 4], 8, 0.5, multi=[1], lr=0.0)
    whole, lacking = jagged([[[2], [3]], [[1], []]]), jagged([[[], []], [[1], []]])
    found = tables(lacking)
    assert found[:, 0].eq(0).all()
    assert found[:, 1].equal(tables(whole)[:, 1])


def test_rows_without_any_weight_are_collected_too() -> None:
    tables = make([2], 8, 0.5, allocation="popularity", counts=[torch.tensor([0, 9])], lr=0.0)
    assert tables.sizes_R.tolist() == [4, 4]
    moving = {"redistribute": 1.0}
    tables = make([3], 8, 0.25, allocation="popularity", counts=[torch.tensor([0, 5, 9])], lr=0.0, schedule=moving)
    assert tables.sizes_R.tolist() == [0, 0, 4]
    tables.collector = Collector(10, tables.rows, 1, 8)
    found = tables(jagged([[[0], [1]]]))
    assert found.eq(0).all()
    (found * 2).sum().backward()
    assert tables.collector.seen().rows_K.tolist() == [0, 1]
    assert tables.collector.seen().sums_KD.eq(2).all()


def test_ids_outside_a_table_are_refused_by_name() -> None:
    tables = make([5, 6], 8, 0.5)
    for wrong, message in (([[5]], "table 't0': id 5 is outside its 5 rows"), ([[-1]], "table 't0': id -1")):
        with pytest.raises(IdError, match=message):
            tables(jagged([wrong, [[0]]]))


# --- training ---------------------------------------------------------------------------------------------------------


def fbgemm_table(weights_RD: Tensor, optimizer: EmbOptimType, pooling: PoolingMode, accumulator: float) -> Any:
    kernel = SplitTableBatchedEmbeddingBagsCodegen(
        [(*weights_RD.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)],
        optimizer=optimizer,
        learning_rate=0.1,
        eps=1e-8,
        pooling_mode=pooling,
        bounds_check_mode=BoundsCheckMode.NONE,
        output_dtype=SparseType.FP32,
    )
    with torch.no_grad():
        kernel.split_embedding_weights()[0].copy_(weights_RD)
        kernel.split_optimizer_states()[0][0].fill_(accumulator)
    return kernel


@pytest.mark.parametrize("accumulator", [0.0, 0.3])
@pytest.mark.parametrize("state", ["row", "element"])
@pytest.mark.parametrize("multi", [False, True])
def test_with_every_weight_it_is_fbgemms_dense_table(multi: bool, state: str, accumulator: float) -> None:
    """Bit for bit where each example has one id; a mean's rounding differs."""
    rng = np.random.default_rng(2)
    tables = make([60], 12, 1.0, multi=[0] if multi else [], state=state, accumulator=accumulator)
    adagrad = EmbOptimType.EXACT_ROWWISE_ADAGRAD if state == "row" else EmbOptimType.EXACT_ADAGRAD
    kernel = fbgemm_table(expanded.weights(tables)["t0"], adagrad, PoolingMode.MEAN, accumulator)
    for _ in range(3):
        bags = random_bags(tables, 100, rng)
        ids = jagged(bags)
        up = torch.from_numpy(rng.normal(size=(100, 12))).float()
        found, expected = tables(ids)[:, 0], kernel(ids.values(), ids.offsets().long())
        (found * up).sum().backward()
        (expected * up).sum().backward()
        pairs = [
            (found, expected),
            (expanded.weights(tables)["t0"], kernel.split_embedding_weights()[0]),
            (expanded.sums(tables)["t0"], kernel.split_optimizer_states()[0][0].view(60, -1).squeeze(1)),
        ]
        for ours, theirs in pairs:
            if multi:
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
            else:
                assert ours.equal(theirs)


def test_a_second_backward_pass_is_refused() -> None:
    """It would step again."""
    tables = make([5], 8, 0.5)
    loss = tables(jagged([[[1], [4]]])).sum()
    loss.backward()
    before = whole(expanded.weights(tables))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert whole(expanded.weights(tables)).equal(before)


@pytest.mark.parametrize("multi", [False, True])
def test_no_examples(multi: bool) -> None:
    tables = make([40, 30], 8, 0.5, multi=[1] if multi else [])
    before = whole(expanded.weights(tables))
    found = tables(jagged([[], []]))
    assert found.shape == (0, 2, 8)
    found.sum().backward()
    assert whole(expanded.weights(tables)).equal(before)


@pytest.mark.parametrize("state", ["row", "element"])
@pytest.mark.parametrize("multi", [False, True])
def test_other_devices_train_alike(multi: bool, state: str) -> None:
    """The tensor operations and fbgemm's autograd, which they use, here on the CPU. A mean's rounding differs."""
    rng = np.random.default_rng(5)
    mine, theirs = (
        make([40, 30], 16, 0.3, multi=[1] if multi else [], state=state, schedule={"redistribute": 0.5})
        for _ in range(2)
    )
    for step in range(6):
        bags = jagged(random_bags(mine, 50, rng))
        up = torch.from_numpy(rng.normal(size=(50, 2, 16))).float()
        if step == 3:  # rows of several sizes
            for tables in (mine, theirs):
                tables.resize(torch.tensor([0, 45]), torch.tensor([1, 69]), torch.ones(2, 16))
        found = mine(bags)
        anchor = torch.empty(0, requires_grad=True)
        expected = theirs._spread(theirs._bags(bags), anchor, None).view(found.shape)
        (found * up).sum().backward()
        (expected * up).sum().backward()
        weights, sums = ([whole(of(t)) for t in (mine, theirs)] for of in (expanded.weights, expanded.sums))
        for ours, other in ((found, expected), weights, sums):
            torch.testing.assert_close(
                ours, other, **({"atol": 1e-6, "rtol": 1e-5} if multi else {"atol": 0, "rtol": 0})
            )
    assert len(mine.groups) > 2


def test_a_new_learning_rate_reaches_old_and_new_kernels() -> None:
    tables = make([40], 8, 0.5, schedule={"redistribute": 1.0})
    tables.set_learning_rate(0.0)
    before = whole(expanded.weights(tables))
    tables(jagged([[[n] for n in range(40)]])).sum().backward()
    assert whole(expanded.weights(tables)).equal(before)
    tables.resize(torch.tensor([0, 1]), torch.tensor([2, 3]), torch.rand(2, 8))
    moved = whole(expanded.weights(tables))
    tables(jagged([[[n] for n in range(40)]])).sum().backward()
    assert whole(expanded.weights(tables)).equal(moved)
    tables.set_learning_rate(0.1)
    tables(jagged([[[n] for n in range(40)]])).sum().backward()
    assert (whole(expanded.weights(tables)) != moved).any(1).sum() == 38  # two rows hold none


# --- the collector ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, 2**12])
def test_a_collector_keeps_a_sample_of_rows_and_their_exact_sums(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where room is short from the first row on, within a batch and between them."""
    monkeypatch.setattr(collect, "_FIRST", first)
    rng = np.random.default_rng(3)
    few, all_ = Collector(50, 500, 7, 4), Collector(10**6, 500, 7, 4)
    exact = np.zeros((500, 4))
    for _ in range(6):
        rows, bags, shares = rng.integers(0, 500, 90), rng.integers(0, 30, 90), rng.random(90)
        grad = rng.normal(size=(30, 4))
        np.add.at(exact, rows, grad[bags] * shares[:, None])
        for collector in (few, all_):
            found = torch.tensor(shares).float(), torch.tensor(grad).float()
            collector.add(torch.tensor(rows), torch.tensor(bags), *found)
            if rng.random() < 0.5:  # a look leaves rows out, and changes nothing in the end
                assert len(collector.seen().rows_K) <= collector.limit
    assert len(few.seen().rows_K) == 50
    assert len(all_.seen().rows_K) > 200
    for collector in (few, all_):
        np.testing.assert_allclose(collector.seen().sums_KD, exact[collector.seen().rows_K.numpy()], atol=1e-5)
        assert collector.seen().rows_K.equal(torch.unique(collector.seen().rows_K))


def test_few_batches_pay_for_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    thinned: list[int] = []
    thin = Collector._thin

    def counted(self: Collector) -> None:
        thinned.append(len(self._rows))
        thin(self)

    monkeypatch.setattr(Collector, "_thin", counted)
    collector = Collector(8000, 200_000, 1, 2)
    for row_N in torch.arange(200_000).split(400):
        collector.add(row_N, torch.zeros_like(row_N), None, torch.ones(1, 2))
    assert 10 < len(thinned) < 25
    assert max(thinned) <= 16_000
    assert len(collector.seen().rows_K) == 8000


@pytest.mark.parametrize(("rows", "limit"), [(200_000, 1000), (900, 1000), (200_000, 1), (3, 2)])
def test_a_collector_never_has_room_for_more_than_a_fourth_above_its_limit(
    rows: int, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor for more rows than there are, however many a batch has."""
    rooms: list[int] = []
    hold = Collector._hold

    def noted(self: Collector, *found: Tensor) -> None:
        hold(self, *found)
        rooms.append(len(self._sums))

    monkeypatch.setattr(Collector, "_hold", noted)
    collector, row_N = Collector(limit, rows, 1, 2), torch.arange(rows)
    for _ in range(2):
        collector.add(row_N, torch.zeros_like(row_N), None, torch.ones(1, 2))
    assert max(rooms) <= min(rows, limit + max(1, limit // 4))
    seen = collector.seen()
    assert len(seen.rows_K) == min(rows, limit)
    assert seen.sums_KD.eq(2).all()


def test_which_rows_a_collector_keeps_follows_from_the_window_alone() -> None:
    def kept(batches: list[Tensor], salt: int) -> list[int]:
        collector = Collector(64, 5000, salt, 2)
        for row_N in batches:
            collector.add(row_N, torch.zeros_like(row_N), None, torch.ones(1, 2))
        return collector.seen().rows_K.tolist()

    rows = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    forth, back = kept(list(rows.split(100)), 9), kept(list(rows.flip(0).split(333)), 9)
    assert forth == back
    assert len(forth) == 64
    assert len(set(forth) & set(kept(list(rows.split(100)), 10))) < 10
    assert abs(np.mean(forth) - 2500) < 700


# --- the mask moves ---------------------------------------------------------------------------------------------------


def brute_exchange(
    weights_D: NDArray[Any], active_D: NDArray[Any], sums_D: NDArray[Any], count: int
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Which weights of a row are dropped and which grow."""
    free = np.flatnonzero(~active_D & (sums_D != 0))
    held = np.flatnonzero(active_D)
    count = min(count, len(free))
    dropped = held[np.argsort(np.abs(weights_D[held]), kind="stable")[:count]]
    return dropped, free[np.argsort(-np.abs(sums_D[free]), kind="stable")[:count]]


@pytest.mark.parametrize("begin", ["step", "zero"])
@pytest.mark.parametrize("state", ["row", "element"])
@pytest.mark.parametrize(
    ("dim", "density", "fraction", "exchanged"),
    [(16, 0.5, 0.25, {8: 2}), (16, 0.375, 0.5, {4: 2, 8: 4}), (6, 0.34, 0.5, {2: 1, 3: 1})],
)
def test_smallest_weights_are_dropped_and_steepest_grow(
    dim: int, density: float, fraction: float, exchanged: dict[int, int], state: str, begin: str
) -> None:
    tables = make([30, 200], dim, density, state=state, accumulator=0.5, schedule={"begin": begin})
    generator = torch.Generator().manual_seed(1)
    for group in tables.groups:
        assert group.state is not None
        group.state.copy_(torch.rand(group.state.shape, generator=generator) + 1)
        some_NS = group.values_NS[::2]
        some_NS.copy_(some_NS.sign() * (some_NS.abs() * 10).ceil() / 10)  # many of them equal
    rows = torch.randperm(230, generator=generator)[:120].sort().values
    sums_KD = torch.randn(120, dim, generator=generator)
    sums_KD[::3] = sums_KD[::3].round()
    sums_KD[5] = 0  # nothing to gain anywhere
    sums_KD[6, 1:] = 0  # or in one place at most
    before, active, sums = (whole(f(tables)).clone() for f in (expanded.weights, expanded.masks, expanded.sums))
    budget = tables.budget
    move(tables, a_window(rows.tolist(), sums_KD), fraction, seed=4)
    assert tables.budget == budget
    check_stored(tables)
    after, active_after, sums_after = (whole(f(tables)) for f in (expanded.weights, expanded.masks, expanded.sums))
    expected, mask, expected_sums = before.clone(), active.clone(), sums.clone()
    tolerance = {}
    for k, row in enumerate(rows.tolist()):
        count = exchanged.get(int(tables.sizes_R[row]))
        if count is None or int(tables.sizes_R[row]) * fraction % 1:
            tolerance[row] = True  # a fraction of a weight: see the next test
            continue
        dropped, grown = brute_exchange(before[row].numpy(), active[row].numpy(), sums_KD[k].numpy(), count)
        expected[row, dropped], expected[row, grown] = 0, 0
        if begin == "step":  # Adagrad's, by the row's sum, or by the mean of those of its active weights
            sum_ = sums[row] if state == "row" else sums[row][active[row]].mean()
            expected[row, grown] = -0.1 * sums_KD[k, grown] / (sum_.sqrt() + 1e-8)
        mask[row, dropped], mask[row, grown] = False, True
        if state == "element":
            expected_sums[row, dropped], expected_sums[row, grown] = 0, 0.5
    exact = [r for r in range(230) if r not in tolerance]
    assert len(exact) > 110
    assert active_after[exact].equal(mask[exact])
    torch.testing.assert_close(after[exact], expected[exact], atol=0, rtol=1e-6)
    assert (after[exact] != 0).any(1).all()
    assert sums_after[exact].equal(expected_sums[exact])
    unseen = sorted(set(range(230)) - set(rows.tolist()))
    assert after[unseen].equal(before[unseen])
    assert sums_after[unseen].equal(sums[unseen])
    assert (active_after != active).any(1).sum() > 80


def test_a_row_that_never_moved_begins_within_the_steps_of_a_window() -> None:
    """Its sum of squares is 0, and a step over its root would have no bound."""
    for schedule in ({"window": 3}, {"window": 3, "redistribute": 1.0}):
        tables = make([50], 8, 0.5, schedule=schedule)
        before = expanded.masks(tables)["t0"]
        sums_KD = torch.randn(50, 8) * 1e-3
        move(tables, a_window(range(50), sums_KD), 0.5, seed=0)
        grown = expanded.masks(tables)["t0"] & ~before
        assert grown.any()
        torch.testing.assert_close(expanded.weights(tables)["t0"][grown], -0.3 * sums_KD[grown].sign())


def test_a_fraction_of_a_weight_is_one_in_so_many_rows() -> None:
    tables = make([4000], 16, 0.25)
    active = expanded.masks(tables)["t0"]
    move(tables, a_window(range(4000), torch.randn(4000, 16)), 0.1, seed=0)
    exchanged_R = (expanded.masks(tables)["t0"] & ~active).sum(1)
    assert set(exchanged_R.tolist()) == {0, 1}
    assert exchanged_R.float().mean().item() == pytest.approx(0.4, abs=0.03)


def test_random_growth_drops_the_smallest_and_grows_anywhere() -> None:
    tables = make([6000], 8, 0.5, schedule={"grow": "random", "begin": "zero"})
    before, active = (f(tables)["t0"].clone() for f in (expanded.weights, expanded.masks))
    move(tables, a_window(range(6000), torch.zeros(6000, 8)), 0.25, seed=0)
    after, active_after = (f(tables)["t0"] for f in (expanded.weights, expanded.masks))
    dropped, grown = active & ~active_after, active_after & ~active
    assert (dropped.sum(1) == 1).all()
    assert (grown.sum(1) == 1).all()
    magnitude = before.abs().masked_fill(~active, torch.inf)
    assert magnitude.argmin(1).equal(dropped.float().argmax(1))
    assert after[grown].eq(0).all()
    place_R = (torch.cumsum(~active, 1) * grown).max(1).values  # the first, second … free position of each row
    assert (torch.bincount(place_R, minlength=5)[1:] / 6000 - 0.25).abs().max() < 0.03
    check_stored(tables)


@pytest.mark.parametrize("begin", ["step", "zero"])
@pytest.mark.parametrize("state", ["row", "element"])
def test_units_go_from_the_rows_with_least_to_lose_to_those_with_most_to_gain(state: str, begin: str) -> None:
    """One budget over all rows of all tables that are sparse; against a loop over rows."""
    dim = 12
    settings: dict[str, Any] = {"state": state, "kept": [1], "accumulator": 0.5}
    tables = make([60, 5, 80], dim, 0.34, schedule={"redistribute": 1.0, "begin": begin}, **settings)
    generator = torch.Generator().manual_seed(2)
    for update in range(4):
        for group in tables.groups:
            group.values_NS[:, : group.size] = torch.randn(len(group), group.size, generator=generator)
            if group.state is not None:
                group.state.copy_(torch.rand(group.state.shape, generator=generator) + 1)
        rows = torch.randperm(145, generator=generator)[:70].sort().values
        sums_KD = torch.randn(70, dim, generator=generator)
        window = a_window(rows.tolist(), sums_KD)
        before, active, sums = (whole(f(tables)).clone() for f in (expanded.weights, expanded.masks, expanded.sums))
        sizes, budget = tables.sizes_R.clone(), tables.budget
        grown_K = _redistribute(tables, window, 0.08)
        units = int(0.08 * budget / UNIT)
        movable = torch.cat([torch.arange(60), torch.arange(65, 145)]).tolist()
        free = sums_KD.abs().masked_fill(active[rows], 0)
        gain = {
            r: float(free[k].topk(UNIT).values.sum())
            for k, r in enumerate(rows.tolist())
            if r in movable and sizes[r] < dim
        }
        takers = sorted(gain, key=lambda r: -gain[r])[:units]
        magnitude = before.abs().masked_fill(~active, torch.inf)
        loss = {
            r: float(magnitude[r].topk(UNIT, largest=False).values.sum())
            for r in movable
            if sizes[r] and r not in takers
        }
        givers = sorted(loss, key=lambda r: loss[r])[:units]
        assert len(takers) == len(givers) == units > 5
        assert rows[grown_K].tolist() == sorted(takers)
        expected, mask, after_sums = before.clone(), active.clone(), sums.clone()
        for r in takers:
            place = free[rows.tolist().index(r)].topk(UNIT).indices
            mask[r, place] = True
            if begin == "step" and sizes[r]:
                sum_ = sums[r] if state == "row" else sums[r][active[r]].mean()
                expected[r, place] = -0.1 * sums_KD[rows.tolist().index(r), place] / (sum_.sqrt() + 1e-8)
            after_sums[(r, place) if state == "element" else r] = 0.5 if state == "element" or not sizes[r] else sums[r]
        for r in givers:
            place = magnitude[r].topk(UNIT, largest=False).indices
            mask[r, place], expected[r, place] = False, 0
            if state == "element":
                after_sums[r, place] = 0
            elif sizes[r] == UNIT:
                after_sums[r] = 0  # the sum of a row goes with its last weight
        assert tables.budget == budget
        check_stored(tables)
        assert whole(expanded.masks(tables)).equal(mask), update
        torch.testing.assert_close(whole(expanded.weights(tables)), expected, atol=0, rtol=1e-6)
        assert whole(expanded.sums(tables)).equal(after_sums)
        bags = random_bags(tables, 30, np.random.default_rng(update))
        dense = list(expected.split([60, 5, 80]))
        torch.testing.assert_close(tables(jagged(bags)), pooled(dense, bags), atol=1e-6, rtol=1e-5)
    assert {0, dim} <= set(tables.sizes_R.tolist())
    assert (tables.sizes_R[60:65] == dim).all()


def test_an_update_with_redistribution_exchanges_in_the_other_rows() -> None:
    tables = make([300], 16, 0.5, schedule={"redistribute": 0.5})
    active, sizes = expanded.masks(tables)["t0"].clone(), tables.sizes_R.clone()
    move(tables, a_window(range(200), torch.randn(200, 16)), 0.25, seed=0)
    changed = expanded.masks(tables)["t0"] != active
    more, less = tables.sizes_R > sizes, tables.sizes_R < sizes
    assert more.sum() == less.sum() == int(0.125 * 300 * 8 / UNIT)
    assert not more[200:].any()
    exchanged = changed.any(1) & ~more & ~less
    assert exchanged[:200].sum() == (~more & ~less)[:200].sum()
    assert not exchanged[200:].any()


def test_where_nothing_is_to_gain_nothing_moves() -> None:
    for schedule in ({}, {"redistribute": 1.0}):
        tables = make([50], 8, 0.5, schedule=schedule)
        before = {n: t.clone() for n, t in tables.tensors().items()}
        move(tables, a_window(range(50), torch.zeros(50, 8)), 1.0, seed=0)
        move(tables, a_window([], torch.zeros(0, 8)), 1.0, seed=0)
        assert all(t.equal(before[n]) for n, t in tables.tensors().items())


# --- the schedule -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("window", "stop"), [(3, 0.75), (10, 1.0), (1, 0.5), (25, 0.8)])
def test_masks_move_at_intervals_until_the_stop_by_a_cosine(
    window: int, stop: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: dict[int, tuple[float, int]] = {}
    steps, interval, last = 100, 10, int(100 * stop)
    tables = make([20], 8, 0.5, schedule={"interval": interval, "window": window, "stop": stop, "fraction": 0.4})
    mover, watched = Mover([tables], steps, steps, 0), []
    now = 0

    def note(tables: SparseTables, seen: Seen, fraction: float, *, seed: int) -> None:
        moved[now] = (fraction, seed)

    monkeypatch.setattr(recsys.sparsity.schedule, "move", note)
    salts: set[int] = set()
    for step in range(steps):
        now = step + 1
        mover.before_step(step)
        if tables.collector is not None:
            watched.append(step)
            salts.add(tables.collector.salt)
        mover.after_step(step)
    assert list(moved) == list(range(interval, last + 1, interval))
    assert watched == [s for s in range(last) if (-s - 1) % interval < min(window, interval)]
    for done, (fraction, _) in moved.items():
        assert fraction == pytest.approx(0.2 * (1 + math.cos(math.pi * done / last)))
    assert len(salts) == len({seed for _, seed in moved.values()}) == len(moved)
    assert tables.collector is None


def test_a_fixed_mask_never_moves() -> None:
    tables = make([20], 8, 0.5, schedule={"grow": "none", "interval": 1000})
    mover = Mover([tables], 10, 10, 0)
    for step in range(10):
        mover.before_step(step)
        assert tables.collector is None
        mover.after_step(step)


def test_an_interval_longer_than_training_is_refused() -> None:
    tables = make([20], 8, 0.5, schedule={"interval": 80, "stop": 0.75})
    with pytest.raises(
        ConfigError, match=r"sparsity\.schedule\.interval = 80 steps: .* before step 75 of 100; use a shorter one"
    ):
        Mover([tables], 100, 100, 0)
    Mover([tables], 100, 100, 0, warm=True)
    with pytest.raises(ConfigError, match=r"before step 80 of 107"):  # at the last one the fraction is 0
        Mover([tables], 107, 107, 0)
    Mover([tables], 108, 108, 0)


@pytest.mark.parametrize(
    ("steps", "per_epoch", "moves"), [(36, 12, [6, 12, 18, 24, 30]), (13, 13, [6, 12]), (1, 1, [])]
)
def test_by_default_masks_move_twice_an_epoch_by_all_gradients(
    steps: int, per_epoch: int, moves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    tables = make([20], 8, 0.5, schedule={"window": None})
    mover = Mover([tables], steps, per_epoch, 0)
    monkeypatch.setattr(recsys.sparsity.schedule, "move", lambda *_, **__: moved.append(now))
    for now in range(1, steps + 1):
        mover.before_step(now - 1)
        assert (tables.collector is not None) == (now <= max(moves, default=0))
        mover.after_step(now - 1)
    assert moved == moves
    assert tables.window == max(1, per_epoch // 2)


# --- what cannot be meant ---------------------------------------------------------------------------------------------


def test_popularity_leaves_no_row_without_weights_unless_they_move_between_rows() -> None:
    rare = {"allocation": "popularity", "counts": [torch.arange(1000), torch.zeros(50)]}
    for density in (0.5, 0.7):
        assert make([1000, 50], 8, density, **rare).sizes_R.min() >= UNIT
    with pytest.raises(ConfigError, match=r"density = 0\.25: .* hold 2 on average, .* at least 0\.5, or schedule\.red"):
        make([1000, 50], 8, 0.25, **rare)
    with pytest.raises(ConfigError, match=r"no weight is left for the 50 rows of table 't1'; use at least 0\.5"):
        make([1000, 50], 8, 0.25, **rare, schedule={"redistribute": 1.0})


@pytest.mark.parametrize("dim", [9, 10, 11])
def test_a_full_table_of_whole_units_leaves_its_rest_to_the_others(dim: int) -> None:
    """Rows may hold no more than 8 of these; the budget is that of the density all the same."""
    tables = make([3000, 6], dim, 0.5, allocation="er", schedule={"redistribute": 0.5})
    assert (tables.sizes_R[3000:] == 8).all()
    assert abs(tables.budget - 0.5 * 3006 * dim) <= 2 * UNIT
    fresh = SparseTables(tables.tables, dim, tables.sparsity, torch.device("meta"), 0.1)
    fresh.adopt(tables.tensors(), "there")  # which refuses another budget


@pytest.mark.parametrize("wrong", [0, -0.1, 1.01, "half"])
def test_densities_outside_0_and_1_are_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="density"):
        parse_config(Sparsity, {"density": wrong}, source="run.toml")


def test_settings_that_cannot_be_meant_are_refused() -> None:
    for schedule in ({"grow": "random", "redistribute": 0.5}, {"grow": "none", "redistribute": 0.5}):
        with pytest.raises(ConfigError, match=r"redistribute = 0\.5: rows compete by their gradients; set grow = "):
            parse_config(Sparsity, {"density": 0.5, "schedule": schedule}, source="run.toml")
    for wrong in ({"fraction": 0}, {"fraction": 1.1}, {"interval": 0}, {"window": 0}, {"stop": 0}, {"window_rows": 0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            parse_config(Sparsity, {"density": 0.5, "schedule": wrong}, source="run.toml")
    with pytest.raises(ConfigError, match="features"):
        parse_config(Sparsity, {"density": 0.5, "features": []}, source="run.toml")


SCHEMA = Schema(
    keys=(),
    dense=(),
    sparse=(Sparse(name="user", rows=400), Sparse(name="tags", rows=30, multi=True), Sparse(name="sex", rows=3)),
    labels=("click",),
)


@pytest.mark.parametrize(
    ("settings", "dim", "message"),
    [
        (
            {"density": 0.05},
            16,
            r"density = 0\.05: a row of 16 would hold 0\.8 weights; use at least 0\.063, or let rows",
        ),
        (
            {"density": 0.02, "schedule": {"redistribute": 0.5}},
            8,
            r"density = 0\.02 leaves table 'sex', 3 x 8, too few weights: none at all; use a larger one, or name the",
        ),
        (
            {"density": 0.127, "allocation": "er"},
            8,
            r"density = 0\.127 leaves table 'user', 400 x 8, too few weights: less than one for each row; use a larger",
        ),
        (
            {"density": 0.9, "allocation": "popularity"},
            9,
            r"density = 0\.9: .* whole units of 4 weights, and those of 9 at most 8; use a density of at most 0\.888",
        ),
        ({"density": 0.9, "allocation": "popularity"}, 3, r"those of 3 at most 0; use wider ones, or neither alloc"),
        ({"density": 0.5}, 256, r"model\.dim: rows of 256 weights; a sparse table's positions are bytes: at most 252"),
        (
            {"density": 0.5, "features": ["usr"]},
            8,
            r"sparsity\.features: 'usr' is no feature with a table; did you mean 'user'",
        ),
    ],
)
def test_tables_that_cannot_be_are_refused(settings: dict[str, Any], dim: int, message: str) -> None:
    sparsity = Sparsity.model_validate(settings)
    with pytest.raises(ConfigError, match=message):
        build_model(FMConfig(dim=dim - 1), SCHEMA, sparsity=sparsity)
