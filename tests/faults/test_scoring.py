"""Batch scoring over an existing good output: a reader sees all of yesterday's or all of today's, whatever happens."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from base.errors import ArtefactError
from base.storage import MANIFEST, resolve, verify, version_name, versions_of
from recsys.bundle import Bundle
from serving.score import publish_scores
from tests.faults.conftest import ROWS, Order, Platform

DAY = "day=2026-03-03"
PARTS = 3
"""Files of an output, at a thousand rows each."""


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "scores" / DAY


@pytest.fixture(scope="module")
def versions(
    platform: Platform, order: Order, bundle_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What model versions 1 and 2 give when nothing happens."""
    found: dict[str, str] = {}
    for model in ("1", "2"):
        target = tmp_path_factory.mktemp("clean") / DAY
        put(order, platform, bundle_path, target, model)
        found[model] = version_name(resolve(target))
    return found


def put(order: Order, platform: Platform, bundle: Path, target: Path, model: str, **options: bool | int) -> None:
    options = {"overwrite": True, **options}
    answer = order("score", config=platform.config, bundle=bundle, target=target, version=model, **options)
    assert (answer.status, answer.result) == (0, ROWS), answer.output


def read(platform: Platform, target: Path) -> str:
    """The model version of a published output, which must be whole: every key once, and no other."""
    folder = resolve(target, "scores")
    assert verify(folder).about["rows"] == ROWS
    table = pl.read_parquet(folder / "part-*.parquet")
    keys = platform.run.source.raw(DAY).select("impression_id").collect()
    assert table["impression_id"].to_list() == keys["impression_id"].to_list()
    assert table["p_click"].is_between(0, 1).all()
    [model] = table["model_version"].unique()
    assert verify(folder).about["model_version"] == model
    return model


def leftovers(target: Path) -> list[str]:
    return [p.name for p in (target.parent / ".versions").glob(".*")]


def copied(target: Path, to: Path) -> Path:
    """An output that is as good, elsewhere."""
    shutil.copytree(target.parent, to, symlinks=True)
    return to / target.name


@pytest.mark.parametrize("fault", ["RECSYS_FAULT", "KILL_BEFORE_CHANGE"])
def test_killed_anywhere(
    platform: Platform,
    order: Order,
    bundle_path: Path,
    target: Path,
    tmp_path: Path,
    versions: dict[str, str],
    fault: str,
) -> None:
    """At every fault point, and before every change to the file system; then run again, cut into other parts."""
    put(order, platform, bundle_path, target, "1")
    arguments = {"config": platform.config, "bundle": bundle_path, "version": "2", "overwrite": True}
    seen: list[str] = []
    for n in range(1, 100):
        here = copied(target, tmp_path / f"{n}")
        plan = f"*:kill:{n}" if fault == "RECSYS_FAULT" else f"{n}"
        killed = order("score", {fault: plan}, **arguments, target=here)
        if killed.status == 0:
            break
        assert killed.status == -signal.SIGKILL, killed.output
        seen.append(read(platform, here))
        put(order, platform, bundle_path, here, "2", chunk=1700)
        assert read(platform, here) == "2"
        assert len(list(here.glob("part-*"))) == 2  # none of the three that were there is left
        assert leftovers(here) == []
        if n == 1:
            put(order, platform, bundle_path, here, "2")
            assert version_name(resolve(here)) == versions["2"]  # the very same bytes as on a clean run
    assert read(platform, here) == "2"
    assert version_name(resolve(here)) == versions["2"]
    assert seen == sorted(seen)
    assert set(seen) == {"1", "2"}
    assert n > 10


def test_a_full_disk_anywhere(
    platform: Platform, order: Order, bundle_path: Path, target: Path, versions: dict[str, str]
) -> None:
    put(order, platform, bundle_path, target, "1")
    arguments = {"config": platform.config, "bundle": bundle_path, "target": target, "overwrite": True}
    for n in range(1, 100):
        failed = order("score", {"RECSYS_FAULT": f"*:enospc:{n}"}, **arguments, version="2")
        if failed.status == 0:
            break
        assert f"OSError: [Errno 28] No space left on device: '{target}'" in failed.output
        assert leftovers(target) == []
        if "storage.linked" not in failed.output:
            assert read(platform, target) == "1"
    assert read(platform, target) == "2"
    assert version_name(resolve(target)) == versions["2"]
    assert n > 10


def test_killed_the_first_time_there_is_nothing_to_read(
    platform: Platform, order: Order, bundle_path: Path, target: Path
) -> None:
    for point in ("score.part", "storage.written", "storage.sealed", "storage.renamed"):
        plan = {"RECSYS_FAULT": f"{point}:kill"}
        killed = order(
            "score", plan, config=platform.config, bundle=bundle_path, target=target, version="1", overwrite=False
        )
        assert killed.status == -signal.SIGKILL
        assert not target.exists()
    put(order, platform, bundle_path, target, "1", overwrite=False)
    assert read(platform, target) == "1"
    assert leftovers(target) == []


def test_the_same_interval_twice_has_the_same_bytes(
    platform: Platform, order: Order, bundle_path: Path, target: Path, versions: dict[str, str]
) -> None:
    put(order, platform, bundle_path, target, "1", overwrite=False)
    put(order, platform, bundle_path, target, "1")
    assert [version_name(v) for v in versions_of(target)] == [versions["1"]]
    files = sorted(p.name for p in resolve(target).iterdir())
    assert files == [MANIFEST, *(f"part-{i:05}.parquet" for i in range(PARTS))]


def test_of_two_scorers_at_once_exactly_one_wins(
    platform: Platform, order: Order, bundle_path: Path, target: Path
) -> None:
    raced = order("race", config=platform.config, bundle=bundle_path, target=target, versions=["1", "2"])
    assert raced.status == 0, raced.output
    assert sorted(raced.result) == [0, 3]
    winner = "12"[raced.result.index(0)]
    assert read(platform, target) == winner
    assert f"{target}: already published; pass --overwrite to replace it, or choose another name" in raced.output
    assert len(versions_of(target)) == 1
    assert leftovers(target) == []


# A disk that is really full


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 200 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small file system needs root: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, *, leave: int) -> None:
    free = os.statvfs(disk)
    (disk / "ballast").write_bytes(b"\0" * (free.f_bavail * free.f_bsize - leave))


@pytest.mark.parametrize("leave", [0, 4096, 16384])
def test_scoring_onto_a_full_disk(
    platform: Platform, order: Order, bundle_path: Path, small_disk: Path, leave: int
) -> None:
    target = small_disk / "scores" / DAY
    put(order, platform, bundle_path, target, "1")
    fill(small_disk, leave=leave)
    before = sorted(small_disk.rglob("*"))
    arguments = ["score", "--config", str(platform.config), "--set", f"output='{small_disk}'", "--overwrite"]
    failed = order("command", arguments=[*arguments, "--model", str(bundle_path)])
    assert failed.status == 2
    assert failed.output.splitlines()[-1].startswith("error: ")
    assert failed.output.endswith(": No space left on device; nothing was published: free some space and run again\n")
    assert str(small_disk) in failed.output.splitlines()[-1]
    assert "Traceback" not in failed.output
    assert read(platform, target) == "1"
    assert sorted(small_disk.rglob("*")) == before
    (small_disk / "ballast").unlink()
    done = order("command", arguments=[*arguments, "--model", str(bundle_path)])
    assert done.status == 0, done.output
    assert read(platform, target).startswith("bundle-")


def test_preparing_onto_a_full_disk(platform: Platform, order: Order, small_disk: Path) -> None:
    arguments = ["prepare", "--config", str(platform.config), "--set", f"output='{small_disk}'"]
    fill(small_disk, leave=32768)
    failed = order("command", arguments=arguments)
    assert failed.status == 2
    assert failed.output.endswith(": No space left on device; nothing was published: free some space and run again\n")
    assert "Traceback" not in failed.output
    assert [p.name for p in small_disk.glob("**/.versions/.*")] == []
    (small_disk / "ballast").unlink()
    done = order("command", arguments=arguments)
    assert done.status == 0, done.output


def test_training_onto_a_full_disk(platform: Platform, order: Order, small_disk: Path) -> None:
    folder = small_disk / "training"
    fill(small_disk, leave=32768)
    failed = order("train", config=platform.config, folder=folder)
    assert failed.status == 1
    assert f"OSError: [Errno 28] No space left on device: '{folder / 'checkpoint'}'" in failed.output
    assert [p.name for p in small_disk.glob("**/.versions/.*")] == []


def test_a_bad_model_publishes_nothing(platform: Platform, bundle_path: Path, target: Path) -> None:
    """Golden rows are scored again before anything is written."""
    bundle = Bundle.load(bundle_path)
    other = replace(bundle, golden=bundle.golden.with_columns(pl.col("@p_click") + 1e-4))
    with pytest.raises(ArtefactError, match=r"p_click of its golden rows differs by [\d.e-]+; this machine"):
        publish_scores(other, platform.run.source.raw(DAY), target, key=["impression_id"], model_version="1")
    assert not target.parent.exists()
