"""What our own processes tell malloc, asked of a process of its own, and what a host is spared."""

import subprocess
import sys

from base import process

BLOCKS = """
import resource
from base import process
{call}
for _ in range(20):  # each block is written and freed; from 32 MiB on glibc maps every one anew
    b"x" * (40 * 2**20)
print(process.kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


def faults(call: str) -> tuple[str, int]:
    found = subprocess.run([sys.executable, "-c", BLOCKS.format(call=call)], capture_output=True, text=True, check=True)
    kept, _, number = found.stdout.strip().rpartition(" ")
    return kept, int(number)


def test_freed_memory_stays_and_is_not_mapped_anew() -> None:
    told, few = faults("process.keep_memory()")
    untold, many = faults("")
    assert untold == "None"
    assert told.startswith("Malloc(mapped_from=")
    assert many > 3 * few


def test_a_host_is_left_as_it_is() -> None:
    """As this process of the tests, whatever of ours it has imported."""
    import pipelines.cli  # noqa: F401

    assert process.kept is None
