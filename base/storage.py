"""The only module that publishes: every artefact is a folder with a manifest, made visible by one atomic step.

A folder is written under a staging name, fsynced, given its manifest, renamed to a version name that is the hash of
its content, and published as a symbolic link. Readers resolve the link once and see all of one version; a killed
writer leaves only a staging folder, which the next writer of that name sweeps away.

    scores/day=2026-03-07 -> .versions/day=2026-03-07@5c1f0e...      what readers open
    scores/.versions/day=2026-03-07@5c1f0e.../{part-0.parquet, manifest.json}
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from base.config import Config
from base.errors import FULL, ArtefactError, PublishedError, SetupError, machine_error
from base.faults import faultpoint

MANIFEST = "manifest.json"
_VERSIONS = ".versions"


class File(Config):
    """One file of an artefact."""

    bytes: int
    sha256: str


class Manifest(Config):
    """What an artefact consists of; written last, so its presence means the folder is complete."""

    kind: str
    """Which artefact this is: examples, features, bundle, scores, ..."""
    files: dict[str, File]
    about: dict[str, Any] = {}
    """Facts a reader needs before opening a file: row counts, versions, parents."""

    @property
    def version(self) -> str:
        """Hash of the content: equal bytes have equal versions."""
        return hashlib.sha256(_dump(self)).hexdigest()[:16]


class Staging:
    """A folder being written. `staging / "a.parquet"` is where a file goes; `about` ends up in the manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.about: dict[str, Any] = {}

    def __truediv__(self, name: str) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def publish(
    target: Path, kind: str, *, overwrite: bool = False, keep: int | None = None
) -> Generator[Staging, None, None]:
    """Write an artefact in the body; on leaving it, publish the whole folder as `target`, or nothing at all.

    Without `overwrite` an existing `target` is refused, before the body and again at the last step, so that of two
    writers at once exactly one wins. `keep` removes all but the newest `keep` versions afterwards.
    Raises PublishedError where the name is taken, OSError naming `target` where the disk is full; other errors of the
    body pass through. None leaves a trace.
    """
    _refuse_taken(target, overwrite=overwrite)
    versions = target.parent / _VERSIONS
    versions.mkdir(parents=True, exist_ok=True)
    staging_folder, lock = _new_staging(versions, target.name)
    with lock:
        try:
            staging = Staging(staging_folder)
            yield staging
            faultpoint("storage.written")
            manifest = _seal(staging, kind)
            faultpoint("storage.sealed")
            with _Lock(versions):  # no other writer sweeps, prunes or publishes meanwhile
                _refuse_taken(target, overwrite=overwrite)
                version = versions / f"{target.name}@{manifest.version}"
                _name(staging_folder, version)
                _fsync(versions)
                faultpoint("storage.renamed")
                _link(target, version, overwrite=overwrite)
            faultpoint("storage.linked")
        except Exception as error:
            found = machine_error(error)
            if found is not None and found.errno in FULL:
                raise OSError(found.errno, found.strerror, str(target)) from error
            raise
        finally:
            shutil.rmtree(staging_folder, ignore_errors=True)
    if keep is not None:
        prune(target, keep=keep)


def is_published(target: Path) -> bool:
    """Whether something stands under the name `target`."""
    return target.is_symlink() or target.exists()


def resolve(target: Path, kind: str | None = None, *, made_by: str = "the step that makes it") -> Path:
    """The version folder behind `target`, followed once; read everything of one artefact through the result.

    Raises ArtefactError if nothing is published there, it has no manifest, or it is of another kind.
    """
    folder = target.resolve()
    if not folder.is_dir():
        raise ArtefactError(f"{target}: nothing is published there; run {made_by}")
    manifest = read_manifest(folder)
    if kind is not None and manifest.kind != kind:
        raise ArtefactError(f"{target}: holds {manifest.kind!r}, not {kind!r}; check the path")
    return folder


def read_manifest(folder: Path) -> Manifest:
    """The manifest of an artefact. Raises ArtefactError if it is missing, unreadable, or not the published one."""
    path = folder / MANIFEST
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtefactError(f"{path}: missing, so this folder is not a complete artefact; make it again") from None
    except ValueError as error:
        raise ArtefactError(f"{path}: not a manifest ({str(error).splitlines()[0]}); make the artefact again") from None
    if folder.parent.name == _VERSIONS and manifest.version != version_name(folder):
        raise ArtefactError(f"{path}: altered since it was published; restore it or make the artefact again")
    return manifest


def verify(folder: Path) -> Manifest:
    """Check every file of an artefact against its manifest.

    Raises ArtefactError naming the first file that is missing, altered, or not listed.
    """
    manifest = read_manifest(folder)
    present = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    for name, expected in manifest.files.items():
        if name not in present:
            raise ArtefactError(f"{folder / name}: missing, though the manifest lists it; restore or rebuild it")
        if _describe(folder / name) != expected:
            raise ArtefactError(f"{folder / name}: differs from its checksum in the manifest; restore or rebuild it")
    for name in sorted(present - manifest.files.keys()):
        raise ArtefactError(f"{folder / name}: not listed in the manifest; remove it or rebuild the artefact")
    return manifest


def published(folder: Path) -> list[Path]:
    """The names published in `folder`, sorted."""
    return sorted(p for p in folder.glob("*") if p.is_symlink()) if folder.is_dir() else []


def versions_of(target: Path) -> list[Path]:
    """All published versions of `target`, oldest first."""
    found = [p for p in (target.parent / _VERSIONS).glob(f"{target.name}@*") if p.is_dir()]
    return sorted(found, key=lambda p: (p.stat().st_mtime_ns, p.name))


def prune(target: Path, *, keep: int, spare: Sequence[str] = ()) -> None:
    """Remove old versions of `target`: all but the newest `keep`, the published one, and those named in `spare`.

    Sweeps what killed writers of `target` left, too.
    """
    versions = target.parent / _VERSIONS
    if not versions.is_dir():
        return
    with _Lock(versions):
        _sweep(versions, target.name)
        current = target.resolve()
        for version in versions_of(target)[:-keep]:
            if version != current and version_name(version) not in spare:
                _discard(version)


def withdraw(target: Path) -> None:
    """Remove a published name and all its versions; readers that followed it before see files vanish."""
    versions = target.parent / _VERSIONS
    with _Lock(versions):
        target.unlink(missing_ok=True)
        _sweep(versions, target.name)
        for version in versions_of(target):
            _discard(version)


def bytes_of(target: Path) -> int:
    """What all versions of a published name occupy."""
    return sum(f.stat().st_size for v in versions_of(target) for f in v.rglob("*") if f.is_file())


def check_filesystem(folder: Path) -> None:
    """Publish twice into a temporary folder inside `folder`, and remove it: everything that publishing needs.

    Raises SetupError saying what does not work there: renaming, links and their replacement, locks, fsync.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".check-", dir=folder) as name:
            target = Path(name) / "artefact"
            for text in ("first", "second"):
                with publish(target, "check", overwrite=True) as staging:
                    (staging / "text").write_text(text)
                if (resolve(target) / "text").read_text() != text:
                    raise SetupError(f"{folder}: a replaced link still leads to the old folder; use another filesystem")
            with _Lock(Path(name)):
                try:
                    with _Lock(Path(name), wait=False):
                        raise SetupError(f"{folder}: locks do not exclude each other; mount it with flock")
                except BlockingIOError:
                    pass
    except OSError as error:
        what = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        raise SetupError(
            f"{folder}: publishing does not work there: {what}; it needs a writable POSIX filesystem with symbolic "
            "links, flock and fsync"
        ) from error


def set_down(text: str, folders: Sequence[Path], name: str) -> Path | None:
    """Write what is nobody's input, a traceback, into the first of the folders that takes it; None if none does."""
    for folder in folders:
        with suppress(OSError, ValueError):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")
            return folder / name
    return None


def version_name(folder: Path) -> str:
    """The version part of a version folder's name."""
    return folder.name.rpartition("@")[2]


def dump_json(value: Mapping[str, Any] | Sequence[Any]) -> bytes:
    """JSON with sorted keys, so that equal values have equal bytes."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str).encode()


def _seal(staging: Staging, kind: str) -> Manifest:
    paths = sorted(p for p in staging.folder.rglob("*") if p.is_file())
    for path in paths:
        _fsync(path)
        faultpoint("storage.synced")
    files = {str(p.relative_to(staging.folder)): _describe(p) for p in paths}
    manifest = Manifest(kind=kind, files=files, about=staging.about)
    (staging / MANIFEST).write_bytes(_dump(manifest))
    _fsync(staging / MANIFEST)
    for folder in [*(p for p in staging.folder.rglob("*") if p.is_dir()), staging.folder]:
        _fsync(folder)
    return manifest


def _dump(manifest: Manifest) -> bytes:
    return dump_json(manifest.model_dump(mode="json"))


def _describe(path: Path) -> File:
    with path.open("rb") as file:
        return File(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _refuse_taken(target: Path, *, overwrite: bool) -> None:
    if target.exists() and not target.is_symlink():
        raise PublishedError(f"{target}: is an ordinary file or folder, not a published link; move it away")
    if not overwrite and is_published(target):
        raise _taken(target)


def _taken(target: Path) -> PublishedError:
    return PublishedError(f"{target}: already published; pass --overwrite to replace it, or choose another name")


def _name(staging_folder: Path, version: Path) -> None:
    """Give a sealed folder its version name. The same bytes, published before, stay as they are unless damaged."""
    if version.exists():
        if _is_sound(version):
            version.touch()  # the newest again
            shutil.rmtree(staging_folder)
            return
        _discard(version)
    os.rename(staging_folder, version)


def _is_sound(version: Path) -> bool:
    try:
        verify(version)
    except ArtefactError:
        return False
    return True


def _link(target: Path, version: Path, *, overwrite: bool) -> None:
    destination = version.relative_to(target.parent)
    if overwrite:
        fresh = version.with_name(f".link-{target.name}@")
        fresh.unlink(missing_ok=True)
        os.symlink(destination, fresh)
        os.replace(fresh, target)
    else:
        try:
            os.symlink(destination, target)  # fails if the name is taken, also where locks do not reach
        except FileExistsError:
            raise _taken(target) from None
    _fsync(target.parent)


def _discard(version: Path) -> None:
    """Remove a version. It loses its name first, so that no half of one is ever taken for a whole."""
    doomed = _staging_path(version.parent, version.name.rpartition("@")[0])
    os.rename(version, doomed)
    faultpoint("storage.discarded")
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def exclusive(folder: Path, say: Callable[[str], None]) -> Generator[None]:
    """Work in `folder` alone, on this machine or any that shares it; waits for whoever does, and says so."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = _Lock(folder, wait=False)
    except BlockingIOError:
        say(f"waiting: another process works in {folder}")
        lock = _Lock(folder)
    with lock:
        yield


class _Lock:
    """An exclusive lock on a folder, held until `__exit__`; it dies with its process."""

    def __init__(self, folder: Path, *, wait: bool = True) -> None:
        self._descriptor = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def _new_staging(versions: Path, name: str) -> tuple[Path, _Lock]:
    """A staging folder whose lock says that its writer lives."""
    with _Lock(versions):
        _sweep(versions, name)
        folder = _staging_path(versions, name)
        folder.mkdir()
        return folder, _Lock(folder)


def _sweep(versions: Path, name: str) -> None:
    """Remove what killed writers of `name` left."""
    for left in versions.glob(f".staging-{name}@*"):
        with suppress(BlockingIOError, FileNotFoundError), _Lock(left, wait=False):
            shutil.rmtree(left, ignore_errors=True)


def _staging_path(versions: Path, name: str) -> Path:
    return versions / f".staging-{name}@{secrets.token_hex(8)}"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
