"""Errors a user can act on: each message names the thing, the value and the remedy."""

import difflib
from collections.abc import Sequence


def did_you_mean(name: str, known: Sequence[str], otherwise: str = ".") -> str:
    """The end of a sentence about an unknown name: the nearest known one, if one is near."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else otherwise


class UserError(Exception):
    """Base of every error the command line prints as one sentence instead of a traceback."""


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
