"""Ties a worker's life to its front's."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def tie_to_parent(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it ends, and ends it at once if that is past.

    parent: pid of the process that should be the parent.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have died before the kernel was told; then init, or a subreaper, is the parent now.
    if os.getppid() != parent:
        os._exit(1)
