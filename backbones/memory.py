"""What a process does with the memory that tensors free."""

import ctypes
import os

# glibc's names (malloc.h) for what mallopt sets.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
# Free memory from which on some goes back to the system: the most that mallopt takes.
_KEPT = 2**31 - 1


def keep_memory() -> bool:
    """Has the process keep up to 2 GB that tensors have freed, for the next ones.

    glibc fetches each tensor of over 32 MB anew from the system, which clears it page by page; of a forward pass on a
    CPU, that may be half the time. Peak memory can rise, because what is kept may not fit what comes next. Commands
    that run models call this; a program of your own may, once, before it does. What the environment says of malloc
    (`MALLOC_...`) is left as it is.

    Returns:
        Whether it was done: False without glibc, and where the environment has its own way.
    """
    if any(name.startswith(("MALLOC_", "LD_PRELOAD")) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library; on Windows, none to look in
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))
