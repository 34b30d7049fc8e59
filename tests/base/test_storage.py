"""Publishing: whole or not at all, also when the writer is killed, the disk is full, or another writer is at it."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from base.errors import ArtefactError, PublishedError
from base.storage import (
    MANIFEST,
    is_published,
    prune,
    publish,
    read_manifest,
    resolve,
    verify,
    version_name,
    versions_of,
)

ROOT = Path(__file__).parents[2]
OLD, NEW = {"part-0": "old", "part-1": "old as well"}, {"part-0": "new", "deep/er/part-1": "new as well"}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "scores" / "day=2026-03-07"


def put(target: Path, files: dict[str, str], *, overwrite: bool = False, keep: int | None = None) -> Path:
    with publish(target, "scores", overwrite=overwrite, keep=keep) as staging:
        for name, text in files.items():
            (staging / name).write_text(text)
        staging.about["parts"] = len(files)
    return resolve(target)


def read(target: Path) -> dict[str, str]:
    """What a reader gets, checked."""
    folder = resolve(target, "scores")
    verify(folder)
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST}


def leftovers(target: Path) -> list[str]:
    return sorted(p.name for p in (target.parent / ".versions").glob(".*"))


Write = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Write]:
    """Publishes files in a process of its own under an environment; returns its exit status and what it said."""
    command = [sys.executable, ROOT / "tests/faults/children.py"]
    environment = {**os.environ, "CHILDREN": str(tmp_path_factory.mktemp("children"))}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writers:
        assert writers.stdin
        assert writers.stdout
        orders, answers = writers.stdin, writers.stdout

        def write(target: Path, files: dict[str, str], **environment: str) -> tuple[int, str]:
            arguments = {"target": str(target), "files": files}
            print(json.dumps(["publish_files", arguments, environment]), file=orders, flush=True)
            status, said, _ = json.loads(answers.readline())
            return status, said

        yield write
        orders.close()


# One writer


def test_first_publication(target: Path) -> None:
    assert not is_published(target)
    folder = put(target, OLD)
    assert is_published(target)
    assert read(target) == OLD
    assert verify(folder).about == {"parts": 2}
    assert target.is_symlink()
    assert not os.readlink(target).startswith("/")  # so that the whole can be moved
    assert leftovers(target) == []


def test_a_published_name_is_refused_before_any_work(target: Path) -> None:
    folder = put(target, OLD)
    with pytest.raises(PublishedError) as caught, publish(target, "scores"):
        pytest.fail("the body ran")
    assert str(caught.value) == f"{target}: already published; pass --overwrite to replace it, or choose another name"
    assert resolve(target) == folder
    assert read(target) == OLD


def test_overwriting_keeps_the_old_version_for_those_who_read_it(target: Path) -> None:
    old = put(target, OLD)
    new = put(target, NEW, overwrite=True)
    assert read(target) == NEW
    assert old != new
    verify(old)
    assert (old / "part-0").read_text() == "old"
    assert versions_of(target) == [old, new]


def test_a_failing_body_leaves_nothing(target: Path) -> None:
    def fail(overwrite: bool) -> None:
        with publish(target, "scores", overwrite=overwrite) as staging:
            (staging / "part-0").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail(overwrite=False)
    assert not is_published(target)
    put(target, OLD)
    with pytest.raises(ZeroDivisionError):
        fail(overwrite=True)
    assert read(target) == OLD
    assert len(versions_of(target)) == 1
    assert leftovers(target) == []


def test_equal_content_is_one_version(target: Path, tmp_path: Path) -> None:
    old = put(target, OLD)
    assert put(target, OLD, overwrite=True) == old
    assert versions_of(target) == [old]
    assert version_name(put(tmp_path / "elsewhere", OLD)) == version_name(old)
    assert version_name(put(tmp_path / "other", NEW)) != version_name(old)


def test_the_facts_in_about_belong_to_the_version(target: Path) -> None:
    old = put(target, OLD)
    with publish(target, "scores", overwrite=True) as staging:
        for name, text in OLD.items():
            (staging / name).write_text(text)
        staging.about["parts"] = 3
    assert resolve(target) != old


def test_going_back_to_an_old_version_makes_it_the_newest(target: Path) -> None:
    old, new = put(target, OLD), put(target, NEW, overwrite=True)
    assert put(target, OLD, overwrite=True) == old
    assert versions_of(target) == [new, old]
    assert read(target) == OLD


@pytest.mark.parametrize("harm", ["altered", "missing", "extra"])
def test_publishing_again_repairs_a_damaged_version(target: Path, harm: str) -> None:
    folder = put(target, OLD)
    match harm:
        case "altered":
            (folder / "part-0").write_text("0ld")
        case "missing":
            (folder / "part-0").unlink()
        case _:
            (folder / "part-2").write_text("?")
    assert put(target, OLD, overwrite=True) == folder
    assert read(target) == OLD
    assert leftovers(target) == []


def test_others_may_read_what_is_published(target: Path) -> None:
    umask = os.umask(0o022)
    try:
        folder = put(target, NEW)
    finally:
        os.umask(umask)
    modes = {stat.S_IMODE(p.stat().st_mode) for p in [folder, folder / "deep/er"]}
    assert modes == {0o755}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_ordinary_file_or_folder_in_the_way_is_refused_before_any_work(
    target: Path, kind: str, overwrite: bool
) -> None:
    if kind == "folder":
        target.mkdir(parents=True)
        (target / "mine").write_text("mine")
    else:
        target.parent.mkdir()
        target.write_text("mine")
    with pytest.raises(PublishedError) as caught, publish(target, "scores", overwrite=overwrite):
        pytest.fail("the body ran")
    assert str(caught.value) == f"{target}: is an ordinary file or folder, not a published link; move it away"
    assert (target / "mine" if kind == "folder" else target).read_text() == "mine"


def test_names_share_a_folder_without_meeting(tmp_path: Path) -> None:
    one, two = tmp_path / "day=1", tmp_path / "day=11"
    put(one, OLD, keep=1)
    put(two, NEW, keep=1)
    put(one, {"part-0": "newest"}, overwrite=True, keep=1)
    assert read(one) == {"part-0": "newest"}
    assert read(two) == NEW
    assert [len(versions_of(t)) for t in (one, two)] == [1, 1]


# Readers


def test_nothing_published_and_another_kind(target: Path) -> None:
    with pytest.raises(ArtefactError) as caught:
        resolve(target)
    assert str(caught.value) == f"{target}: nothing is published there; run the step that makes it"
    put(target, OLD)
    with pytest.raises(ArtefactError) as caught:
        resolve(target, "bundle")
    assert str(caught.value) == f"{target}: holds 'scores', not 'bundle'; check the path"


def test_a_folder_without_a_manifest_is_no_artefact(tmp_path: Path) -> None:
    (tmp_path / "part-0").write_text("?")
    with pytest.raises(ArtefactError) as caught:
        resolve(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / MANIFEST}: missing, so this folder is not a complete artefact; make it again"
    )


@pytest.mark.parametrize("text", ["", "{", "{}", '{"kind": 1, "files": {}}', "\x00"])
def test_a_damaged_manifest_is_named(target: Path, text: str) -> None:
    path = put(target, OLD) / MANIFEST
    path.write_text(text)
    with pytest.raises(ArtefactError) as caught:
        resolve(target)
    assert str(caught.value).startswith(f"{path}: not a manifest (")
    assert str(caught.value).endswith("make the artefact again")


def test_an_altered_manifest_is_noticed_byte_by_byte(target: Path) -> None:
    path = put(target, OLD) / MANIFEST
    sound = path.read_bytes()
    for i in range(len(sound)):
        path.write_bytes(sound[:i] + bytes([sound[i] ^ 1]) + sound[i + 1 :])
        with pytest.raises(ArtefactError) as caught:
            verify(resolve(target))
        assert str(caught.value).startswith(f"{path}: ")
        if i == sound.index(b'"parts": 2') + 9:
            assert str(caught.value) == (
                f"{path}: altered since it was published; restore it or make the artefact again"
            )


def test_any_facts_survive_the_manifest(target: Path) -> None:
    about = {
        "path": Path("a"),
        "pair": (1, None),
        "share": 0.1 + 0.2,
        "größe": {"b": [True], "a": "\u2028"},
        "at": 1e300,
    }
    with publish(target, "scores") as staging:
        staging.about.update(about)
    assert read_manifest(resolve(target)).about == {**about, "path": "a", "pair": [1, None]}


def test_verify_names_what_is_wrong(target: Path) -> None:
    folder = put(target, NEW)
    (folder / "surplus").write_text("")
    with pytest.raises(ArtefactError) as caught:
        verify(folder)
    assert str(caught.value) == (f"{folder / 'surplus'}: not listed in the manifest; remove it or rebuild the artefact")
    (folder / "surplus").unlink()
    (folder / "part-0").write_text("neW")  # as long as before
    with pytest.raises(ArtefactError) as caught:
        verify(folder)
    assert str(caught.value) == (
        f"{folder / 'part-0'}: differs from its checksum in the manifest; restore or rebuild it"
    )
    (folder / "part-0").write_text("new")
    (folder / "deep/er/part-1").unlink()
    with pytest.raises(ArtefactError) as caught:
        verify(folder)
    assert str(caught.value) == (
        f"{folder / 'deep/er/part-1'}: missing, though the manifest lists it; restore or rebuild it"
    )


def test_the_version_is_the_hash_of_the_manifest(target: Path) -> None:
    folder = put(target, OLD)
    assert read_manifest(folder).version == version_name(folder)


# Retention


def test_keep_removes_all_but_the_newest(target: Path) -> None:
    versions = [put(target, {"part-0": f"{i}"}, overwrite=True, keep=3) for i in range(6)]
    assert versions_of(target) == versions[-3:]
    assert read(target) == {"part-0": "5"}
    assert leftovers(target) == []


def test_prune_spares_the_published_and_the_named(target: Path) -> None:
    a, b, c, d = (put(target, {"part-0": f"{i}"}, overwrite=True) for i in range(4))
    assert put(target, {"part-0": "1"}, overwrite=True) == b
    os.utime(b, ns=(0, 0))  # published, though the oldest by its time
    prune(target, keep=1, spare=[version_name(a)])
    assert versions_of(target) == [b, a, d]
    assert not c.exists()


def test_prune_sweeps_what_a_killed_writer_left(target: Path, write: Write) -> None:
    put(target, OLD)
    assert write(target, NEW, RECSYS_FAULT="storage.sealed:kill") == (-signal.SIGKILL, "")
    assert len(leftovers(target)) == 1
    prune(target, keep=1)
    assert leftovers(target) == []
    assert read(target) == OLD


def test_prune_where_nothing_is(target: Path) -> None:
    prune(target, keep=1)
    assert not target.parent.exists()


# Several writers


def test_a_live_writer_is_left_alone(target: Path) -> None:
    with publish(target, "scores", overwrite=True) as staging:
        (staging / "part-0").write_text("slow")
        put(target, OLD, overwrite=True)
        assert len(leftovers(target)) == 1
    assert read(target) == {"part-0": "slow"}
    assert leftovers(target) == []


def test_the_loser_of_a_race_says_so(target: Path) -> None:
    def lose() -> None:
        with publish(target, "scores") as staging:
            (staging / "part-0").write_text("slow")
            put(target, OLD)

    with pytest.raises(PublishedError, match="already published; pass --overwrite"):
        lose()
    assert read(target) == OLD
    assert len(versions_of(target)) == 1
    assert leftovers(target) == []


def test_many_threads_overwrite_one_name(target: Path) -> None:
    put(target, OLD)
    failures: list[BaseException] = []
    stop = threading.Event()

    def write(number: int) -> None:
        try:
            for i in range(10):
                with publish(target, "scores", overwrite=True, keep=1) as staging:
                    (staging / "part-0").write_text(f"{i % 3}" if number % 2 else f"{number} {i}")
        except BaseException as error:
            failures.append(error)

    def watch() -> None:
        try:
            while not stop.is_set():
                assert os.readlink(target)
                assert target.resolve().name.startswith("day=2026-03-07@")
        except BaseException as error:
            failures.append(error)

    reader, writers = threading.Thread(target=watch), [threading.Thread(target=write, args=(n,)) for n in range(4)]
    for thread in [reader, *writers]:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert failures == []
    read(target)
    assert leftovers(target) == []


RACER = """
import sys
from pathlib import Path
from base.errors import PublishedError
from base.storage import publish

target, name, overwrite = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "overwrite"
print("ready", flush=True)
sys.stdin.readline()
try:
    with publish(target, "scores", overwrite=overwrite) as staging:
        (staging / "part-0").write_text(name)
        print("written", flush=True)
        sys.stdin.readline()
except PublishedError as error:
    print(error, file=sys.stderr)
    sys.exit(3)
"""


def race(target: Path, how: str) -> Iterator[tuple[str, int, str]]:
    """Two processes that have both begun before either finishes: name, exit status and what it says."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(target), name, how],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    for said in ("ready\n", "written\n"):
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == said
        for process in processes:
            assert process.stdin
            process.stdin.write("\n")
            process.stdin.flush()
    for name, process in zip(("one", "two"), processes, strict=True):
        _, error = process.communicate(timeout=60)
        yield name, process.returncode, error


def test_of_two_processes_at_once_exactly_one_wins(target: Path) -> None:
    outcomes = {status: (name, said) for name, status, said in race(target, "once")}
    assert sorted(outcomes) == [0, 3]
    assert read(target) == {"part-0": outcomes[0][0]}
    assert outcomes[3][1] == (f"{target}: already published; pass --overwrite to replace it, or choose another name\n")
    assert len(versions_of(target)) == 1
    assert leftovers(target) == []


def test_of_two_overwriting_processes_both_finish_and_one_is_seen(target: Path) -> None:
    put(target, OLD)
    assert [status for _, status, _ in race(target, "overwrite")] == [0, 0]
    assert read(target) in ({"part-0": "one"}, {"part-0": "two"})
    assert len(versions_of(target)) == 3


# Faults


@pytest.mark.parametrize("overwritten", [OLD, {}], ids=["over a good one", "for the first time"])
@pytest.mark.parametrize("fault", ["RECSYS_FAULT", "KILL_BEFORE_CHANGE"])
def test_killed_anywhere_a_reader_sees_all_of_the_old_or_of_the_new(
    target: Path, write: Write, fault: str, overwritten: dict[str, str]
) -> None:
    """At every fault point, and before every single change to the file system."""
    seen: list[dict[str, str]] = []
    for n in range(1, 100):
        here = target.parent / f"{n}" / target.name
        if overwritten:
            put(here, overwritten)
        status, said = write(here, NEW, **{fault: f"*:kill:{n}" if fault == "RECSYS_FAULT" else f"{n}"})
        if status == 0:
            break
        assert status == -signal.SIGKILL, said
        if overwritten or is_published(here):
            seen.append(read(here))
        assert write(here, NEW) == (0, "")
        assert read(here) == NEW
        assert leftovers(here) == []
        assert len(versions_of(here)) == 1
    else:
        pytest.fail("it never finished by itself")
    assert n > 5
    assert all(found in (overwritten, NEW) for found in seen)
    assert NEW in seen
    assert overwritten in [*seen, {}]


@pytest.mark.parametrize("overwritten", [OLD, {}], ids=["over a good one", "for the first time"])
def test_on_a_full_disk_the_old_stays_until_the_new_is_whole(
    target: Path, write: Write, overwritten: dict[str, str]
) -> None:
    seen: list[dict[str, str]] = []
    for n in range(1, 100):
        here = target.parent / f"{n}" / target.name
        if overwritten:
            put(here, overwritten)
        status, said = write(here, NEW, RECSYS_FAULT=f"*:enospc:{n}")
        if status == 0:
            break
        assert "OSError: [Errno 28] No space left on device" in said
        if overwritten or is_published(here):
            seen.append(read(here))
        assert seen[-1:] == [NEW] or leftovers(here) == []
        assert write(here, NEW) == (0, "")
        assert read(here) == NEW
        assert leftovers(here) == []
    else:
        pytest.fail("it never finished by itself")
    assert n > 5
    assert all(found in (overwritten, NEW) for found in seen)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.ENOSPC, "No space left on device", "deep/inside"),
        RuntimeError("parquet: underlying IO error: No space left on device (os error 28)"),
    ],
    ids=["Python", "Python with a name", "Rust"],
)
def test_a_full_disk_is_told_with_the_name_to_publish(target: Path, error: Exception) -> None:
    put(target, OLD)
    with pytest.raises(OSError, match="No space left on device") as caught, publish(target, "scores", overwrite=True):
        raise error
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(target))
    assert caught.value.__cause__ is error
    assert read(target) == OLD
    assert leftovers(target) == []


def test_other_errors_pass_as_they_are(target: Path) -> None:
    for error in (OSError(errno.EACCES, "Permission denied"), RuntimeError("(os error 2)"), KeyError("x")):
        with pytest.raises(type(error)) as caught, publish(target, "scores"):
            raise error
        assert caught.value is error


def test_no_half_removed_version_is_taken_for_a_whole(target: Path, write: Write) -> None:
    """Killed while pruning, then the removed bytes are published again."""
    put(target, OLD)
    assert write(target, NEW, RECSYS_FAULT="storage.discarded:kill") == (-signal.SIGKILL, "")
    assert read(target) == NEW
    assert len(versions_of(target)) == 1
    put(target, OLD, overwrite=True)
    assert read(target) == OLD
    assert leftovers(target) == []
