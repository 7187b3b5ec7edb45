"""What a process asks of Linux for itself."""

from __future__ import annotations

import ctypes
import sys

_PR_SET_DUMPABLE = 4


def hide_memory() -> None:
    """From now on only root can trace this process, read its memory or open its descriptors.

    Other processes of the same user could, else. It writes no core dump any more. It stays so
    until the process executes another program or changes its user. Linux only.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)
