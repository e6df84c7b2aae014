"""glibc's malloc, told to keep large blocks instead of giving them back to the kernel after each message.

Left alone, glibc maps every block above a threshold afresh and unmaps it when freed, so a process that moves large
messages spends most of its time on page faults: a 64 MB echo takes two to three times as long. Pinned, the pages
stay; the price is a resident size that stays at its highest.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

# From <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_M_ARENA_MAX = -8


def pin_malloc() -> bool:
    """Makes glibc serve large blocks from its heaps (no mmap) and keep what is freed (no trim), for the whole process.

    Does nothing where whoever runs the process has configured malloc already (a MALLOC_* variable, glibc.malloc in
    GLIBC_TUNABLES), or where the C library is not glibc. Calling it twice is harmless; it cannot be undone.

    Returns whether malloc is pinned now.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - present in glibc alone; musl has a mallopt that does nothing
        mallopt = libc.mallopt
    except (OSError, AttributeError, TypeError):
        # TypeError: Windows, where a library must be named.
        return False
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    mallopt.restype = ctypes.c_int
    # Not M_MMAP_THRESHOLD: glibc refuses thresholds above 32 MiB.
    return bool(mallopt(_M_ARENA_MAX, 1)) and bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))


def trim_malloc() -> None:
    """Gives back to the system what the allocator merely keeps. Does nothing where the C library is not glibc."""
    # Without glibc there is nothing to trim; TypeError: Windows, as above.
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
