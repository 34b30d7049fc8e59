"""The compiled loops against sums over an expanded table, and against the tensor operations that other devices use."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from recsys.sparsity import kernels
from recsys.sparsity.kernels import Bags, Compiled, Lookups
from recsys.sparsity.layout import slots_of

DIM, TABLES, BATCH, ROWS = 16, 3, 70, 200


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Also so small a batch is divided."""
    monkeypatch.setattr(kernels, "_PART", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def bags(rng: np.random.Generator, *, mean: bool, tables: int = TABLES) -> Bags:
    """Of none to forty rows, so that some are longer than what is asked for ahead."""
    count_X = rng.integers(0, 6, BATCH * TABLES) + 35 * (rng.random(BATCH * TABLES) < 0.1)
    row_N = rng.integers(0, ROWS, count_X.sum())
    return Bags(torch.from_numpy(row_N), torch.from_numpy(count_X.cumsum()), tables, mean)


def groups(rng: np.random.Generator, sizes: list[int]) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Weights and positions of rows shared out among groups at random, and the place of each row."""
    sizes_R = rng.choice(sizes, ROWS)
    found: list[tuple[Tensor, Tensor]] = []
    for size in sizes:
        count = int((sizes_R == size).sum())
        values_NS = np.zeros((count, slots_of(size)), dtype=np.float32)
        positions_NS = np.zeros(values_NS.shape, dtype=np.uint8)
        values_NS[:, :size] = rng.normal(size=(count, size))
        positions_NS[:, :size] = np.sort(rng.random((count, DIM)).argsort(1)[:, :size], 1)
        found.append((torch.from_numpy(values_NS), torch.from_numpy(positions_NS)))
    order_R = np.concatenate([(sizes_R == size).nonzero()[0] for size in sizes])
    return found, torch.from_numpy(order_R.argsort().astype(np.int32))


def expanded(sizes: list[int], found: list[tuple[Tensor, Tensor]], place_R: Tensor) -> Tensor:
    """table_RD with 0 where there is no weight."""
    parts = [
        torch.zeros(len(values_NS), DIM).scatter(1, positions_NS[:, :size].long(), values_NS[:, :size])
        for size, (values_NS, positions_NS) in zip(sizes, found, strict=True)
    ]
    return torch.cat(parts)[place_R.long()]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("tables", [1, TABLES])
@pytest.mark.parametrize("sizes", [[1], [12], [16], [0, 4], [2, 4, 8, 12, 16]])
def test_embeddings_and_gradients(sizes: list[int], tables: int, mean: bool, threads: int) -> None:
    rng = np.random.default_rng(len(sizes))
    asked = bags(rng, mean=mean, tables=tables)
    found, place_R = groups(rng, sizes)
    mine = Compiled(asked, sizes, found, place_R if len(sizes) > 1 else None)
    table_RD = expanded(sizes, found, place_R).double()

    bag_N, weight_N = asked.bags(), asked.weights()
    share_N = torch.ones(len(bag_N)) if weight_N is None else weight_N
    wanted_XD = torch.zeros(BATCH * TABLES, DIM, dtype=torch.float64)
    wanted_XD.index_add_(0, bag_N, table_RD[asked.row_N] * share_N.double().unsqueeze(1))
    torch.testing.assert_close(mine.dense(DIM).double(), wanted_XD, atol=1e-5, rtol=1e-5)

    grad_XD = torch.randn(BATCH * TABLES, DIM)
    place_N, start = place_R[asked.row_N].long(), 0
    for size, (values_NS, positions_NS), (index_N, grad_NS) in zip(sizes, found, mine.gradients(grad_XD), strict=True):
        chosen_N = ((place_N >= start) & (place_N < start + len(values_NS))).nonzero().squeeze(1)
        assert index_N.equal(place_N[chosen_N] - start)
        start += len(values_NS)
        share = None if weight_N is None else weight_N[chosen_N]
        plain = Lookups(size, positions_NS[index_N], bag_N[chosen_N], share)
        assert grad_NS.equal(plain.gradients(grad_XD))
        assert size == 0 or grad_NS[:, :size].abs().min() > 0
        assert not grad_NS[:, size:].any()
    assert start == ROWS


def test_where_bags_are() -> None:
    """By table they go across the batch; what a row counts in a mean follows them."""
    row_N, ends_X = torch.arange(5), torch.tensor([2, 2, 3, 5])
    apart, together = (Bags(row_N, ends_X, tables, mean=True) for tables in (2, 1))
    assert apart.bags().tolist() == [0, 0, 1, 3, 3]
    assert together.bags().tolist() == [0, 0, 2, 3, 3]
    weight_N = apart.weights()
    assert weight_N is not None
    assert weight_N.tolist() == [0.5, 0.5, 1, 0.5, 0.5]
    assert Bags(row_N, ends_X, 2, mean=False).weights() is None


def test_what_is_added_does_not_depend_on_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No bag is divided among them."""
    monkeypatch.setattr(kernels, "_PART", 1)
    found: list[list[Tensor]] = []
    for threads in (1, 2, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        rng = np.random.default_rng(0)
        asked = bags(rng, mean=True)
        mine = Compiled(asked, [4, 8], *groups(rng, [4, 8]))
        assert len(mine._cuts) == threads + 1
        dense_XD = mine.dense(DIM)
        found.append([dense_XD, *(x for both in mine.gradients(dense_XD) for x in both)])
    for others in found[1:]:
        assert all(a.equal(b) for a, b in zip(found[0], others, strict=True))


def test_what_the_loops_would_misread_is_refused() -> None:
    """They go by address, beyond which is somebody else's memory."""
    rng = np.random.default_rng(0)
    asked = bags(rng, mean=True)
    ((values_NS, positions_NS),), place_R = groups(rng, [8])
    Compiled(asked, [8], [(values_NS, positions_NS)], None)
    for wrong in (
        (values_NS.double(), positions_NS),
        (values_NS, positions_NS.long()),
        (values_NS[:, :6].contiguous(), positions_NS[:, :6].contiguous()),
        (values_NS.t().contiguous().t(), positions_NS),
    ):
        with pytest.raises(AssertionError):
            Compiled(asked, [8], [wrong], None)
    with pytest.raises(AssertionError):
        Compiled(asked, [], [], None)
    with pytest.raises(AssertionError):
        Compiled(asked, [8], [(values_NS, positions_NS)], place_R.long())
    with pytest.raises(AssertionError):
        Compiled(Bags(asked.row_N[1:], asked.ends_X, TABLES, mean=True), [8], [(values_NS, positions_NS)], None)


def test_nothing_is_looked_up() -> None:
    rng = np.random.default_rng(0)
    for ends_X in (torch.zeros(6, dtype=torch.int64), torch.empty(0, dtype=torch.int64)):
        mine = Compiled(Bags(torch.empty(0, dtype=torch.int64), ends_X, 3, mean=True), [4, 8], *groups(rng, [4, 8]))
        dense_XD = mine.dense(DIM)
        assert dense_XD.shape == (len(ends_X), DIM)
        assert not dense_XD.any()
        assert [len(index_N) for index_N, _ in mine.gradients(dense_XD)] == [0, 0]
