"""Of many cases some that `make test` runs, while `make slow` runs the others."""

import os
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import settings


def quick(cases: Mapping[str, Any], *ids: str) -> list[Any]:
    """Parameters by their ids, a tuple for several at once; all that are not named are slow."""
    assert {*ids} <= {*cases}, f"no such cases: {sorted({*ids} - {*cases})}"
    values = {name: value if isinstance(value, tuple) else (value,) for name, value in cases.items()}
    return [
        pytest.param(*value, id=name, marks=() if name in ids else pytest.mark.slow) for name, value in values.items()
    ]


def drawn(number: int) -> settings:
    """So many examples for a property; a quarter of them, others every time, unless THOROUGH is set."""
    return settings(max_examples=number if os.environ.get("THOROUGH") else -(-number // 4), deadline=None)
