"""A Bundle that is too large to upload: the registered model holds where its published folder lies, and its version."""

from pathlib import Path
from typing import Self

from pydantic import ValidationError

from base.config import Config
from base.errors import ArtefactError
from base.storage import Staging, resolve
from recsys.bundle import KIND, Bundle

FILE = "reference.json"


class Reference(Config):
    """A published Bundle on a filesystem that every machine mounts under the same path."""

    folder: Path
    """Its immutable version folder, absolute; never the link, which moves."""
    bundle: str
    """Its version, which is the hash of its manifest, and so of every file."""

    @classmethod
    def to(cls, bundle: Bundle, published: Path) -> Self:
        """The reference to `bundle`, published as `published`. Raises ArtefactError if nothing is there."""
        return cls(folder=resolve(published, KIND), bundle=bundle.version)

    def write(self, staging: Staging) -> Path:
        """Write it as a file of its own, and return that."""
        file = staging / FILE
        (staging / FILE).write_text(self.model_dump_json(indent=2))
        return file

    def load(self) -> Bundle:
        """The Bundle. Raises ArtefactError if its folder is gone, altered, or holds another one."""
        if not self.folder.is_dir():
            raise ArtefactError(
                f"{self.folder}: the registered bundle {self.bundle} is not there; mount the filesystem that holds it, "
                "restore the folder, or return to another version with `recsys rollback`"
            )
        bundle = Bundle.load(self.folder)
        if bundle.version != self.bundle:
            raise ArtefactError(
                f"{self.folder}: holds bundle {bundle.version}, but {self.bundle} was registered; restore the folder, "
                "or return to another version with `recsys rollback`"
            )
        return bundle


def load_registered(artifact: Path) -> Bundle:
    """The Bundle that a registered model holds (a folder) or refers to (a file).

    Raises ArtefactError naming what is missing or altered.
    """
    if artifact.is_dir():
        return Bundle.load(artifact)
    try:
        return Reference.model_validate_json(artifact.read_bytes()).load()
    except (OSError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise ArtefactError(f"{artifact}: no reference to a bundle ({first}); register the model again") from None
