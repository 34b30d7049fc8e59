"""Named fault points: where tests kill the process or fail a call, driven by one environment variable.

RECSYS_FAULT="NAME:ACTION[:N]" acts at the N-th passage (from 1) of the point NAME; `*` matches every point.
Actions: kill (SIGKILL to this process), enospc (OSError as from a full disk), raise (RuntimeError).
"""

import errno
import os
import signal

ENVIRONMENT_VARIABLE = "RECSYS_FAULT"
_passages = 0


def faultpoint(name: str) -> None:
    """Do nothing, unless the environment asks for a fault here."""
    plan = os.environ.get(ENVIRONMENT_VARIABLE)
    if plan:
        _act(name, plan)


def _act(name: str, plan: str) -> None:
    global _passages
    target, action, *rest = plan.split(":")
    if target not in (name, "*"):
        return
    _passages += 1
    if _passages != int(rest[0] if rest else 1):
        return
    match action:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "enospc":
            raise OSError(errno.ENOSPC, "No space left on device", name)
        case _:
            raise RuntimeError(f"fault injected at {name}")
