"""Recommendations over existing good ones: a reader sees all of the old or all of the new, whatever happens."""

import signal
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from base.config import load_config
from base.storage import resolve, verify, version_name
from pipelines.config import Run
from pipelines.index import index
from pipelines.prepare import prepare
from pipelines.train import train
from tests.faults.conftest import Answer, Order
from tests.pipelines.test_retrieval import corpus, log, quiet

RUN_FILE = """
output = "{folder}/out"
features = [{{ kind = "vocabulary", column = "user" }}, {{ kind = "vocabulary", column = "item" }}]

[data]
path = "{folder}/log.parquet"
key = ["user", "item"]
labels = ["liked"]
split = {{ per_user = "user", train = 0.8, valid = 0.2, test_where = "part = 'new'" }}

[retrieval]
user = "user"
item = "item"
items = "{folder}/items.parquet"
k = [5]

[index]
kind = "hnsw"

[recommend]
k = 6

[model]
name = "two_tower"
query = ["user"]
item = ["item"]
dim = 8

[train]
monitor = "recall"
epochs = 1
threads = 1
"""
USERS, PARTS = 45, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run file whose model is trained and whose items are indexed."""
    folder = tmp_path_factory.mktemp("recommending")
    log().write_parquet(folder / "log.parquet")
    corpus().write_parquet(folder / "items.parquet")
    config = folder / "run.toml"
    config.write_text(RUN_FILE.format(folder=folder))
    run = load_config(Run, config)
    prepare(run, say=quiet)
    train(run, say=quiet)
    index(run, model=str(run.bundle_path), say=quiet)
    return config


@pytest.fixture
def put(config: Path, order: Order) -> Callable[..., Answer]:
    bundle = load_config(Run, config).bundle_path

    def put(k: int, fault: str | None = None, chunk: int = 15) -> Answer:
        plan = {} if fault is None else {"RECSYS_FAULT": fault}
        return order("recommend", plan, config=config, bundle=bundle, k=k, chunk=chunk * k)

    return put


def read(target: Path) -> int:
    """How many items every user has of a published output, which must be whole."""
    folder = resolve(target, "recommendations")
    about = verify(folder).about
    table = pl.read_parquet(folder / "part-*.parquet")
    k = about["k"]
    assert table.height == about["rows"] == USERS * k
    assert table.group_by("user").len()["len"].unique().to_list() == [k]
    return k


def leftovers(target: Path) -> list[str]:
    return [p.name for p in (target.parent / ".versions").glob(".*")]


def test_killed_at_any_point(config: Path, put: Callable[..., Answer]) -> None:
    target = load_config(Run, config).recommendations_path("split=test")
    first = put(5, "recommend.part:kill:2")
    assert first.status == -signal.SIGKILL, first.output
    assert not target.exists()
    assert put(5).status == 0
    assert leftovers(target) == []
    assert len(list(resolve(target).glob("part-*"))) == PARTS
    clean = version_name(resolve(target))
    points = [f"recommend.part:kill:{n + 1}" for n in range(PARTS)]
    points += [f"storage.{name}:kill" for name in ("written", "synced", "sealed", "renamed", "linked")]
    seen: list[int] = []
    for point in points:
        killed = put(6, point)
        assert killed.status == -signal.SIGKILL, killed.output
        seen.append(read(target))
    assert seen == [5] * (len(points) - 1) + [6]
    assert put(5).status == 0
    assert leftovers(target) == []
    assert version_name(resolve(target)) == clean


def test_a_full_disk_publishes_nothing(config: Path, put: Callable[..., Answer]) -> None:
    target = load_config(Run, config).recommendations_path("split=test")
    assert put(5).status == 0
    failed = put(6, "recommend.part:enospc:2")
    assert f"OSError: [Errno 28] No space left on device: '{target}'" in failed.output
    assert read(target) == 5
    assert leftovers(target) == []
