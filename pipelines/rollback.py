"""rollback: the champion before becomes the champion again; the next scoring uses it."""

from collections.abc import Callable

from pipelines.config import Run
from pipelines.line import follow
from pipelines.tracking import registry_alone, registry_of
from recsys.registry import CHAMPION, Registered


def rollback(run: Run, *, say: Callable[[str], None] = print) -> Registered:
    """Return to the previous champion, after loading it, and print from which version to which.

    Daily steps go on with its line; where that is the same, they go on from the newest state, the one that the version
    rolled back was made of: train anew with --full if that is what was bad. A rollback that was killed is finished.

    Raises RegistryError if there is none, or another champion than when this rollback was asked for; ArtefactError if
    its Bundle is damaged. The champion then stays.
    """
    registry = registry_of(run)
    left = registry.aliases().get(CHAMPION)
    with registry_alone(run, say):
        registry.require_champion(left, "this rollback waited; run it again if that version is to go, too")
        bundle = registry.bundle_of(registry.previous())
        bundle.check_golden()
        follow(run, bundle.origin.line)  # first: once the alias has moved, a repetition does nothing more
        champion = registry.rollback()
    if left == champion.version:
        say(f"champion of {registry.name!r}: version {left}; a rollback that was cut off is finished")
    else:
        say(f"champion of {registry.name!r}: from version {left or 'none'} back to version {champion.version}")
    return champion
