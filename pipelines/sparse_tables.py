"""What sparse tables say of themselves: found out when a bundle is made, kept with it, told to terminal and MLflow."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from pipelines.config import Run
from pipelines.examples import examples_of
from recsys.bundle import Bundle
from recsys.data import ExampleStream
from recsys.sparsity.describe import Description, describe

_SPARSE = "sparse"
"""Its place among a bundle's metrics."""


def with_description(run: Run, bundle: Bundle, path_of: Callable[[str], Path]) -> Bundle:
    """The bundle with what its sparse tables are in numbers, rows counting by their lookups in training."""
    if bundle.sparsity is None:
        return bundle
    files = examples_of(run, run.source.partitions("train"), bundle.features, path_of)
    counts = ExampleStream(tuple(files), bundle.schema, run.train.batch_size).row_counts()
    found = describe(bundle.model, counts)
    assert found is not None
    return replace(bundle, metrics={**bundle.metrics, _SPARSE: found.model_dump(mode="json")})


def described(bundle: Bundle) -> Description | None:
    """What training found out about a bundle's tables, or what they say without it; None if they are dense."""
    told = bundle.metrics.get(_SPARSE)
    return describe(bundle.model) if told is None else Description.model_validate(told)


def sentence(found: Description) -> str:
    """The same in a sentence, for a terminal."""
    taken, dense = found.sparse.training, found.dense.training
    of = {"row": "row", "element": "weight"}[found.state]
    return (
        f"sparse tables: {found.budget:,} of {found.cells:,} weights exist ({found.budget / found.cells:.1%}); with "
        f"positions and the optimizer's sums, one of each {of}, {size_of(taken)}, dense {size_of(dense)} "
        f"({taken / dense:.0%}); "
        f"{found.share_not_sparse:.1%} of all parameters are not sparse at all"
    )


def figures(found: Description) -> dict[str, float]:
    """The same for MLflow; densities are in the history."""
    strengths = {f"spread.{s.field}": s.spread for s in found.strengths() if s.spread is not None}
    return {
        "sparse.weights": found.budget,
        "sparse.density": found.budget / found.cells,
        "sparse.share_not_sparse": found.share_not_sparse,
        "sparse.bytes_in_training": found.sparse.training,
        "sparse.bytes_in_training_if_dense": found.dense.training,
        **strengths,
    }


def size_of(count: int) -> str:
    """Bytes, as 999 B or 12.3 MB."""
    if count < 1000:
        return f"{count} B"
    power = min(3, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:,.1f} {('kB', 'MB', 'GB')[power - 1]}"
