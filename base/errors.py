"""Errors a user can act on: each message names the thing, the value and the remedy."""

import difflib
import errno
import os
import re
from collections.abc import Iterator, Sequence

from base.masking import masked


def did_you_mean(name: str, known: Sequence[str], otherwise: str = ".") -> str:
    """The end of a sentence about an unknown name: the nearest known one, if one is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else otherwise


class UserError(Exception):
    """Base of every error the command line prints as one sentence instead of a traceback.

    Passwords of addresses in the message are masked here, so that no message can hold one.
    """

    def __init__(self, message: str) -> None:
        super().__init__(masked(message))


class ConfigError(UserError):
    """A run file says something that cannot be meant."""


class DataError(UserError):
    """A table does not keep its contract: columns, types, labels, keys."""


class IdError(DataError):
    """An id lies outside its embedding table."""


class Superseded(UserError):  # noqa: N818  (no fault: there is nothing left to do)
    """A later day has done this step's work already."""


class ArtefactError(UserError):
    """A stored artefact is incomplete, altered, or belongs to something else."""


class PublishedError(UserError):
    """The name to publish under is taken, and overwriting was not asked for."""


class RegistryError(UserError):
    """MLflow cannot be reached, or has no such model."""


class SetupError(UserError):
    """The installation or the machine cannot do what was asked."""


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Numbers of a full disk's errors."""
_REMEDIES = {
    **dict.fromkeys(FULL, "nothing was published: free some space and run again"),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM), "see that it can be read and written, or name another folder"
    ),
    **dict.fromkeys((errno.ENOTDIR, errno.EEXIST), "move away the file that is in the way, or name another folder"),
    errno.ENAMETOOLONG: "give it a shorter name",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (`ulimit -n`)"),
    errno.ENOMEM: "free some memory, or raise the limits of memory and threads (`ulimit -v`, `ulimit -u`)",
    **dict.fromkeys((errno.EIO, errno.ESTALE), "see that the disk or the network filesystem is sound, and run again"),
}
_NUMBER = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")
_MEMORY = re.compile(
    "can't start new thread|Resource temporarily unavailable|std::bad_alloc|"
    "(can't allocate|not enough|(?<!CUDA )out of) memory"
)


def machine_error(error: BaseException) -> OSError | None:
    """What the machine refused, where that is behind an error: space, rights, files, memory.

    It is looked for in what caused the error, and in texts, since Polars, safetensors and MLflow give the number of an
    error only there. A SetupError has been explained already.
    """
    for cause in () if isinstance(error, SetupError) else causes(error):
        text = next(iter(str(cause).splitlines()), "")
        if isinstance(cause, OSError) and cause.errno in _REMEDIES:
            return OSError(cause.errno, os.strerror(cause.errno), cause.filename2 or cause.filename)
        if found := _NUMBER.search(str(cause)):
            number = int(found[1] or found[2])
            if number in _REMEDIES:
                return OSError(number, os.strerror(number) if number in FULL else text)
        if isinstance(cause, MemoryError) or (not isinstance(cause, OSError) and _MEMORY.search(text)):
            return OSError(errno.ENOMEM, text or os.strerror(errno.ENOMEM))
        if isinstance(cause, FileNotFoundError) and "No usable temporary directory" in text:
            return OSError(errno.ENOSPC, "no temporary folder can be written to", "TMPDIR")
    return None


def explained(error: OSError) -> SetupError:
    """One sentence of what `machine_error` found."""
    assert error.errno is not None
    where = error.filename or ("the output folder" if error.errno in FULL else "")
    return SetupError(f"{where}{': ' if where else ''}{error.strerror}; {_REMEDIES[error.errno]}")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and those that it was raised from or beside, unless it was raised `from None`."""
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
