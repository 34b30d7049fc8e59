"""What the machine refuses is one sentence, however deep it lies; anything else is not explained away."""

import errno
import tempfile
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from base.errors import SetupError, explained, machine_error


def raised(call: Callable[[], object]) -> BaseException:
    with pytest.raises(Exception) as caught:  # noqa: PT011
        call()
    return caught.value


def sentence(error: BaseException) -> str:
    found = machine_error(error)
    assert found is not None
    return str(explained(found))


def test_a_full_disk() -> None:
    full = "No space left on device; nothing was published: free some space and run again"
    assert sentence(raised(lambda: Path("/dev/full").write_text("x"))) == f"the output folder: {full}"
    assert sentence(raised(lambda: pl.DataFrame({"a": [1]}).write_parquet("/dev/full"))) == f"the output folder: {full}"
    error = OSError(errno.ENOSPC, "No space left on device", "from", None, "to")
    assert sentence(raised(lambda: behind(error))) == f"to: {full}"


def behind(error: Exception) -> None:
    try:
        raise error
    except OSError:
        raise RuntimeError("it failed")  # noqa: B904


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "see that it can be read and written, or name another folder"),
        (errno.EACCES, "see that it can be read and written, or name another folder"),
        (errno.ENAMETOOLONG, "give it a shorter name"),
        (errno.EMFILE, "raise the limit of open files (`ulimit -n`)"),
        (errno.EIO, "see that the disk or the network filesystem is sound, and run again"),
    ],
)
def test_each_refusal_has_its_remedy(number: int, remedy: str) -> None:
    error = OSError(number, "whatever", "out/x")
    assert sentence(error).startswith("out/x: ")
    assert sentence(error).endswith(f"; {remedy}")


def test_a_file_in_the_way() -> None:
    remedy = "move away the file that is in the way, or name another folder"
    for call in (lambda: Path("/dev/null/x").mkdir(), lambda: Path("/dev/null").mkdir()):
        assert sentence(raised(call)).endswith(f"; {remedy}")


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("can't start new thread"), RuntimeError("std::bad_alloc")]
)
def test_memory_and_threads(error: Exception) -> None:
    assert sentence(error).endswith(
        "; free some memory, or raise the limits of memory and threads (`ulimit -v`, `ulimit -u`)"
    )


def test_no_temporary_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/dev/null"])
    assert sentence(raised(tempfile.gettempdir)).startswith("TMPDIR: no temporary folder can be written to; ")


@pytest.mark.parametrize(
    "error", [FileNotFoundError(errno.ENOENT, "No such file", "x"), ValueError("no"), SetupError("(os error 28)")]
)
def test_what_is_not_the_machines(error: Exception) -> None:
    assert machine_error(error) is None


def test_what_was_only_being_handled_explains_nothing() -> None:
    """A bug that is raised `from None` while a file was found to exist is a bug."""

    def bug() -> None:
        try:
            raise FileExistsError(errno.EEXIST, "File exists", "/a")
        except FileExistsError:
            raise KeyError("bug") from None

    assert machine_error(raised(bug)) is None


def test_a_gpus_memory_is_not_the_machines() -> None:
    assert machine_error(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")) is None
    assert machine_error(RuntimeError("out of memory")) is not None
