"""Memory that is kept is not fetched again."""

import subprocess
import sys

import pytest

_FAULTS = """
import resource, sys, torch
from backbones.memory import keep_memory
done = sys.argv[1] == "keep" and keep_memory()
for _ in range(16):  # until small objects have found their place
    torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(2**24)
print(done, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_memory_that_is_kept_is_not_fetched_again():
    plain = {"PATH": "/usr/bin:/bin"}
    done, kept = _run("keep", plain)
    if done == "False":
        pytest.skip("this C library has no mallopt")
    _, anew = _run("leave", plain)
    assert int(anew) > 4 * int(kept)


@pytest.mark.skipif(sys.platform != "linux", reason="is about glibc")
def test_what_the_environment_says_of_malloc_is_left():
    done, _ = _run("keep", {"PATH": "/usr/bin:/bin", "MALLOC_ARENA_MAX": "2"})
    assert done == "False"


def _run(what, environment):
    command = [sys.executable, "-c", _FAULTS, what]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
