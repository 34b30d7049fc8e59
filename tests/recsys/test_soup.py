"""The mean of members with one mask."""

import pytest
import torch
from torch import Tensor

from base.errors import ArtefactError
from recsys.sparsity.soup import average


def members() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    positions = torch.tensor([[0, 3, 4, 7], [1, 2, 5, 6]], dtype=torch.uint8)
    sizes_R = torch.tensor([4, 4], dtype=torch.uint8)
    return [
        {"values.4": torch.randn(2, 4, generator=generator), "positions.4": positions, "sizes_R": sizes_R}
        for _ in range(3)
    ]


def test_weights_are_averaged_and_the_mask_is_kept() -> None:
    given = members()
    before = [m["values.4"].clone() for m in given]
    found = average(iter(given))
    expected = sum(m["values.4"].double() for m in given) / 3
    torch.testing.assert_close(found["values.4"].double(), expected, atol=1e-7, rtol=1e-6)
    for name in ("positions.4", "sizes_R"):
        assert found[name].equal(given[0][name])
    assert found.keys() == given[0].keys()
    assert all(m["values.4"].equal(b) for m, b in zip(given, before, strict=True))


def test_what_is_0_in_all_members_stays_0() -> None:
    given = [m | {"values.4": m["values.4"] * torch.tensor([1, 1, 1, 0])} for m in members()]
    assert not average(given)["values.4"][:, 3].any()


@pytest.mark.parametrize("number", [1, 2])
def test_members_with_other_masks_have_no_mean(number: int) -> None:
    moved = torch.tensor([[0, 3, 5, 7], [1, 2, 5, 6]], dtype=torch.uint8)
    changes = {
        "positions.4": {"positions.4": moved},
        "sizes_R": {"sizes_R": torch.tensor([4, 8], dtype=torch.uint8)},
        "values.8": {"values.8": torch.zeros(1, 8)},
        "values.4": {"values.4": torch.zeros(1, 4)},
    }
    for name, change in changes.items():
        given = members()
        given[number] |= change
        with pytest.raises(
            ArtefactError, match=rf"{name} differs between member 1 and member [23]: only models with one mask"
        ):
            average(given)
