"""Killed anywhere, training goes on from a complete checkpoint and ends with the very same weights."""

import signal
from pathlib import Path

import pytest

from base.storage import read_manifest, resolve, verify, versions_of
from recsys import checkpoint
from tests.faults.conftest import Answer, Order, Platform
from tests.marks import quick

COMMITTED = (0, 2, 4, 6, 8, 10, 12)
"""Steps with a checkpoint: every second one, and the end of each of the two epochs of six."""


SPARSE = """
[sparsity]
density = 0.5
state = "element"

[sparsity.schedule]
interval = 3
window = 2
redistribute = 0.5
stop = 1
"""
"""The mask moves after steps 3, 6, 9 and 12, so that most checkpoints lie in a window."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "training"


@pytest.fixture(scope="module")
def sparse(platform: Platform, order: Order, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Answer]:
    """A run file with sparse tables, the training folder of a run that nothing happened to, and its outcome."""
    root = tmp_path_factory.mktemp("sparse")
    config = root / "run.toml"
    config.write_text(platform.config.read_text() + SPARSE)
    answer = order("train", config=config, folder=root / "uninterrupted")
    assert answer.status == 0, answer.output
    return config, root / "uninterrupted", answer


def step_of(folder: Path) -> int:
    """Where the last committed checkpoint stands; it must be whole."""
    position = checkpoint.position_of(folder)
    return position.step if position else 0


def check_finished(folder: Path, found: Answer, expected: Answer) -> None:
    assert found.status == 0, found.output
    assert found.result["weights"] == expected.result["weights"]
    assert found.result["history"] == expected.result["history"]
    assert [p.name for p in (folder / ".versions").glob(".*")] == []
    for name in ("checkpoint", "best"):
        for version in versions_of(folder / name):
            verify(version)
    assert len(versions_of(folder / "checkpoint")) == 1
    assert len(versions_of(folder / "best")) <= 2


# (fault point, passage, step from which the next process goes on)
KILLS = [
    ("storage.synced", 1, 0),
    ("storage.synced", 5, 2),
    ("storage.written", 1, 0),
    ("storage.written", 3, 4),
    ("storage.sealed", 2, 2),
    ("storage.renamed", 1, 0),
    ("storage.renamed", 3, 4),
    ("storage.linked", 1, 2),
    ("storage.linked", 3, 4),  # the best weights of epoch 1, which no checkpoint names yet
    ("storage.linked", 4, 6),
    ("storage.discarded", 1, 4),
    ("checkpoint.published", 1, 2),
    ("checkpoint.published", 3, 6),
    ("checkpoint.published", 6, 12),
    ("trainer.step", 1, 0),
    ("trainer.step", 3, 2),
    ("trainer.step", 6, 4),
    ("trainer.best", 1, 4),
    ("trainer.best", 2, 10),
]


# Of each point one is quick; with sparse tables, which pass by the same ones, those within an epoch and at its end.
POINTS = {f"{point} {passage}": (point, passage, resumed_at) for point, passage, resumed_at in KILLS}


@pytest.mark.parametrize(("point", "passage", "resumed_at"), quick(
    POINTS,
    *("storage.synced 5", "storage.written 3", "storage.sealed 2", "storage.renamed 3", "storage.linked 3"),
    *("storage.discarded 1", "checkpoint.published 6", "trainer.step 1", "trainer.best 2"),
))  # fmt: skip
def test_killed_once_and_run_again(
    platform: Platform,
    order: Order,
    uninterrupted: tuple[Path, Answer],
    folder: Path,
    point: str,
    passage: int,
    resumed_at: int,
) -> None:
    killed = order("train", {"RECSYS_FAULT": f"{point}:kill:{passage}"}, config=platform.config, folder=folder)
    assert killed.status == -signal.SIGKILL, killed.output
    assert step_of(folder) == resumed_at
    again = order("train", config=platform.config, folder=folder)
    assert again.result["resumed_at"] == resumed_at
    check_finished(folder, again, uninterrupted[1])


@pytest.mark.parametrize(("point", "passage", "resumed_at"), quick(
    POINTS, "storage.linked 4", "checkpoint.published 3", "trainer.step 6", "trainer.best 2"
))  # fmt: skip
def test_sparse_tables_are_killed_once_and_run_again(
    sparse: tuple[Path, Path, Answer], order: Order, folder: Path, point: str, passage: int, resumed_at: int
) -> None:
    """Masks, weights, sums and the window that is watched: all that the last checkpoint holds is the same."""
    config, uninterrupted, expected = sparse
    killed = order("train", {"RECSYS_FAULT": f"{point}:kill:{passage}"}, config=config, folder=folder)
    assert killed.status == -signal.SIGKILL, killed.output
    stands = step_of(folder)
    assert stands <= resumed_at  # a checkpoint of sparse tables is one file more
    again = order("train", config=config, folder=folder)
    assert again.result["resumed_at"] == stands
    check_finished(folder, again, expected)
    for file in read_manifest(resolve(uninterrupted / "checkpoint")).files:
        ours, theirs = (resolve(f / "checkpoint") / file for f in (folder, uninterrupted))
        assert ours.read_bytes() == theirs.read_bytes(), file


def test_killed_again_and_again(
    platform: Platform, order: Order, uninterrupted: tuple[Path, Answer], folder: Path
) -> None:
    """Every process dies at its twentieth fault point; none goes back behind a checkpoint."""
    steps = [0]
    for _ in range(30):
        answer = order("train", {"RECSYS_FAULT": "*:kill:20"}, config=platform.config, folder=folder)
        if answer.status == 0:
            break
        assert answer.status == -signal.SIGKILL, answer.output
        steps.append(step_of(folder))
    assert len(steps) > 3
    assert steps == sorted(steps)
    assert set(steps) <= set(COMMITTED)
    check_finished(folder, answer, uninterrupted[1])


@pytest.mark.parametrize("point", ["storage.synced", "storage.sealed", "storage.renamed"])
def test_a_full_disk_ends_training_and_the_last_checkpoint_stays(
    platform: Platform, order: Order, uninterrupted: tuple[Path, Answer], folder: Path, point: str
) -> None:
    passage = 4 if point == "storage.synced" else 2
    failed = order("train", {"RECSYS_FAULT": f"{point}:enospc:{passage}"}, config=platform.config, folder=folder)
    assert failed.status == 1
    assert f"OSError: [Errno 28] No space left on device: '{folder / 'checkpoint'}'" in failed.output
    assert step_of(folder) == 2
    assert [p.name for p in (folder / ".versions").glob(".*")] == []
    check_finished(folder, order("train", config=platform.config, folder=folder), uninterrupted[1])


def test_a_finished_run_is_not_trained_again(
    platform: Platform, order: Order, uninterrupted: tuple[Path, Answer]
) -> None:
    folder, expected = uninterrupted
    again = order("train", config=platform.config, folder=folder)
    assert again.result["resumed_at"] == 12
    check_finished(folder, again, expected)


def test_a_damaged_checkpoint_is_refused_by_name(platform: Platform, order: Order, folder: Path) -> None:
    order("train", {"RECSYS_FAULT": "trainer.step:kill:3"}, config=platform.config, folder=folder)
    stored = (folder / "checkpoint").resolve() / "table_states" / "small.safetensors"
    data = bytearray(stored.read_bytes())
    data[-1] ^= 1
    stored.write_bytes(data)
    refused = order("train", config=platform.config, folder=folder)
    assert refused.status == 1
    assert f"ArtefactError: {stored}: differs from its checksum in the manifest" in refused.output


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["RECSYS_FAULT", "KILL_BEFORE_CHANGE"])
def test_killed_at_every_write(
    platform: Platform, order: Order, uninterrupted: tuple[Path, Answer], tmp_path: Path, fault: str
) -> None:
    """At every fault point, and before every change to the file system, of a whole training run."""
    for n in range(1, 1000):
        folder = tmp_path / f"{n}"
        plan = f"*:kill:{n}" if fault == "RECSYS_FAULT" else f"{n}"
        killed = order("train", {fault: plan}, config=platform.config, folder=folder)
        if killed.status == 0:
            break
        assert killed.status == -signal.SIGKILL, killed.output
        resumed_at = step_of(folder)
        assert resumed_at in COMMITTED
        again = order("train", config=platform.config, folder=folder)
        assert again.result["resumed_at"] == resumed_at
        check_finished(folder, again, uninterrupted[1])
    assert n > 60
