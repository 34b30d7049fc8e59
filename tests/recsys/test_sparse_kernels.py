"""The compiled loops against the tensor operations that other devices use, and against numpy."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from recsys.sparsity import kernels
from recsys.sparsity.kernels import Lookups, rows_of, split

DIM, BAGS = 16, 300


class Plain(Lookups):
    """As on a device without compiled loops."""

    @property
    def _compiled(self) -> bool:
        return False


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Also so small a batch is divided."""
    monkeypatch.setattr(kernels, "_PART", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def lookups(size: int, *, shares: bool, seed: int = 0) -> Lookups:
    rng = np.random.default_rng(seed)
    bag_N = np.repeat(rng.permutation(BAGS), rng.integers(0, 6, BAGS))
    positions_NS = np.zeros((len(bag_N), -(-size // 4) * 4), dtype=np.uint8)
    positions_NS[:, :size] = rng.random((len(bag_N), DIM)).argsort(1)[:, :size]
    share_X = torch.rand(BAGS, generator=torch.Generator().manual_seed(seed)) if shares else None
    return Lookups(size, torch.from_numpy(positions_NS), torch.from_numpy(bag_N), share_X)


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("size", [1, 4, 8, 12])
def test_weights_and_gradients_are_those_of_tensor_operations(size: int, shares: bool, threads: int) -> None:
    mine = lookups(size, shares=shares)
    plain = Plain(mine.size, mine.positions_NS, mine.bag_N, mine.share_X)
    value_NS = torch.randn(mine.positions_NS.shape)
    value_NS[:, size:] = 0
    found_XD, wanted_XD = torch.randn(BAGS, DIM), torch.empty(BAGS, DIM)
    wanted_XD.copy_(found_XD)
    mine.add(value_NS, found_XD)
    plain.add(value_NS, wanted_XD)
    assert torch.equal(found_XD, wanted_XD)
    grad_XD = torch.randn(BAGS, DIM)
    found_NS = mine.gradients(grad_XD)
    assert torch.equal(found_NS, plain.gradients(grad_XD))
    assert found_NS[:, :size].abs().min() > 0
    assert not found_NS[:, size:].any()


def test_no_bag_is_divided_among_threads(threads: int) -> None:
    """One bag of all lookups is one part: two threads would add to the same numbers at once."""
    mine = replace(lookups(4, shares=False), bag_N=torch.zeros_like(lookups(4, shares=False).bag_N))
    parts: list[tuple[int, int]] = []
    mine._each_part(lambda start, stop, *_: parts.append((start, stop)))
    assert [p for p in parts if p[0] < p[1]] == [(0, len(mine.bag_N))]
    assert len(parts) == threads


@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.uint8, 4), (torch.uint8, 8), (torch.uint8, 12), (torch.float32, 4), (torch.float32, 12)]
)
def test_rows(dtype: torch.dtype, width: int) -> None:
    table_RS = torch.randint(0, 200, (50, width)).to(dtype)
    index_N = torch.randint(0, 50, (200,))
    assert torch.equal(rows_of(table_RS, index_N), table_RS[index_N])


def test_split_by_group() -> None:
    place_R = torch.randperm(100, dtype=torch.int32)
    row_N = torch.randint(0, 100, (500,))
    starts, ends = [0, 10, 10], [10, 10, 100]
    place_N = place_R[row_N].long()
    for (index_N, chosen_N), start, end in zip(split(row_N, place_R, ends), starts, ends, strict=True):
        wanted_N = ((place_N >= start) & (place_N < end)).nonzero().squeeze(1)
        assert torch.equal(chosen_N, wanted_N)
        assert torch.equal(index_N, place_N[wanted_N] - start)
