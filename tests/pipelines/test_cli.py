"""How the command line ends where nobody foresaw why: one sentence, an exit status, and the traceback in a file."""

import errno
import tempfile
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import pipelines.clean
from pipelines import cli

DEMO = Path(__file__).parents[2] / "pipelines" / "runs" / "demo.toml"


class Panic(BaseException):
    """What Polars raises where Rust panics is no Exception either."""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def failing(error: BaseException, output: Path | str, monkeypatch: pytest.MonkeyPatch) -> Result:
    """The end of `recsys clean`, if it raises this."""

    def clean(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(pipelines.clean, "clean", clean)
    arguments = ["clean", "--config", str(DEMO), "--set", f"output='{output}'", "--keep", "7"]
    return CliRunner().invoke(cli.main, arguments, catch_exceptions=False)


@pytest.mark.parametrize("kind", [RuntimeError, FileNotFoundError, Panic])
def test_an_unforeseen_error(
    kind: type[BaseException], tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = failing(kind("at http://u:S3cret@h\nand more"), tmp_path / "out", monkeypatch)
    assert ended.exit_code == cli.UNEXPECTED
    [file] = (tmp_path / "out" / "tracebacks").iterdir()
    assert ended.output == (
        f"error: unforeseen: {kind.__name__}: at http://…@h; the traceback is in {file}; "
        "send it to whoever maintains recsys\n"
    )
    text = file.read_text()
    assert text.startswith("Traceback")
    assert "in clean" in text
    assert "S3cret" not in text
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("output", ["/dev/null", "/proc/none"])
def test_an_output_that_takes_no_traceback(output: str, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = failing(RuntimeError("no"), output, monkeypatch)
    assert ended.exit_code == cli.UNEXPECTED
    [file] = temporary.iterdir()
    assert f"; the traceback is in {file}; " in ended.output
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    ended = failing(RuntimeError("no"), output, monkeypatch)
    assert ended.exit_code == cli.UNEXPECTED
    assert ended.output.startswith("Traceback")
    assert "error: unforeseen: RuntimeError: no; the traceback is above, since no folder takes it; " in ended.output


@pytest.mark.parametrize("ending", [KeyboardInterrupt(), SystemExit(5)])
def test_an_interrupt_is_no_error(ending: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = failing(ending, tmp_path / "out", monkeypatch)
    assert ended.exit_code == (5 if isinstance(ending, SystemExit) else 1)
    assert "unforeseen" not in ended.output
    assert not (tmp_path / "out").exists()


def test_what_the_machine_refuses_is_told_with_its_remedy(tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", Path("/dev/null")):
        arguments = ["generate", "--out", str(out), "--days", "2026-03-01", "--rows", "10"]
        ended = CliRunner().invoke(cli.main, arguments, catch_exceptions=False)
        assert ended.exit_code == cli.USER_ERROR
        assert ended.output.startswith(f"error: {out}")
        assert ended.output.endswith("; move away the file that is in the way, or name another folder\n")
    assert (tmp_path / "file").read_text() == "mine"
    assert list(temporary.iterdir()) == []


def test_nobody_who_reads_on_is_no_fault(tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = failing(BrokenPipeError(errno.EPIPE, "Broken pipe"), tmp_path / "out", monkeypatch)
    assert (ended.exit_code, ended.output) == (1, "")  # as click ends it
    assert not (tmp_path / "out").exists()
    assert list(temporary.iterdir()) == []
