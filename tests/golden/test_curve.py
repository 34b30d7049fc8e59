"""A training curve that is kept: the same log, configuration and seed must go on learning the same.

    UPDATE_GOLDEN=1 pytest tests/golden      writes curve.txt anew, after a change that is meant to move it

Other CPUs round differently, so numbers are compared to two parts in a thousand. A change beyond that is a change of
what is computed: say in the commit why it is right.
"""

import os
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest
import torch

from features.pipeline import FeaturePipeline
from features.readers.synthetic import SyntheticConfig, day_frame
from features.schema import carried
from features.transforms import Cross, Hash, Log, Quantiles, Standardise, Vocabulary
from recsys.data import ExampleStream
from recsys.models import AutoIntConfig
from recsys.trainer import TrainConfig, train

CURVE = Path(__file__).with_name("curve.txt")
TOLERANCE = 2e-3
COLUMNS = ("epoch", "train_loss", "p_click.log_loss", "p_click.auc")

LOG = SyntheticConfig(rows_per_day=4_000, users=400, items=100, click_rate=0.3, seed=11)
FEATURES = FeaturePipeline(
    (
        Vocabulary(column="user_id", min_count=2),
        Hash(column="item_id", buckets=64),
        Vocabulary(column="category"),
        Vocabulary(column="device"),
        Vocabulary(column="country", max_size=30),
        Vocabulary(column="placement"),
        Cross(columns=("device", "category"), buckets=400),
        Vocabulary(column="tags", multi=True),
        Quantiles(column="age", buckets=8),
        Log(column="price"),
        Standardise(column="dearness"),
    ),
    {"dearness": "price / (1 + recency_hours)"},
)
MODEL = AutoIntConfig(dim=8, layers=2, heads=2, attention_dim=8)
TRAIN = TrainConfig(
    batch_size=128, epochs=2, learning_rate=2e-3, table_learning_rate=0.1, table_eps=1e-8, seed=1, threads=1
)


def measured(folder: Path) -> list[dict[str, float]]:
    """Two epochs on two days, measured on the third."""
    days = [day_frame(LOG, LOG.start + timedelta(days=n)) for n in range(3)]
    fitted = FEATURES.fit(day.lazy() for day in days[:2])
    files: list[Path] = []
    for n, day in enumerate(days):
        labelled = day.lazy().rename({"click": carried("click")})
        files.append(folder / f"{n}.parquet")
        fitted.transform(labelled, keep=[carried("click")]).collect().write_parquet(files[-1])
    schema = fitted.schema([], ["click"])
    fit = ExampleStream(tuple(files[:2]), schema, TRAIN.batch_size, shuffle=True, seed=1)
    valid = ExampleStream(tuple(files[2:]), schema, 1_024)
    return train(MODEL, schema, fit, valid, TRAIN, folder / "state").history


def test_the_training_curve_is_the_one_kept(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        history = measured(tmp_path)
    finally:
        torch.set_num_threads(threads)
    found = pl.DataFrame(history).select(COLUMNS)
    if os.environ.get("UPDATE_GOLDEN"):
        CURVE.write_text(found.write_csv(separator="\t", float_precision=6))
    kept = pl.read_csv(CURVE, separator="\t")
    assert kept.columns == found.columns
    for column in COLUMNS:
        assert found[column].to_list() == pytest.approx(kept[column].to_list(), rel=TOLERANCE), column
    assert found["p_click.auc"][-1] > 0.65  # what is kept is a curve of something that learns
