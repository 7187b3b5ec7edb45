"""prctl(2): attributes that a process sets on itself. Elsewhere than on Linux, nothing is set."""

from __future__ import annotations

import ctypes
import os
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38


def hide_memory() -> None:
    """Allow only root to trace this process, read its memory or open its descriptors.

    Without this, other processes of the same user could. The process also writes no core dump.
    This lasts until it executes another program or changes its user.
    """
    _set(_PR_SET_DUMPABLE, 0)


def set_parent_death_signal(number: int) -> None:
    """Have the kernel send this process the signal when its parent exits."""
    _set(_PR_SET_PDEATHSIG, number)


def set_subreaper(enabled: bool) -> None:
    """Become the parent of orphaned descendants, or stop becoming it."""
    _set(_PR_SET_CHILD_SUBREAPER, int(enabled))


def set_no_new_privileges() -> None:
    """Ignore set-user-id bits of programs that this thread executes; raise OSError on failure."""
    if _set(_PR_SET_NO_NEW_PRIVS, 1):
        number = ctypes.get_errno()
        raise OSError(number, f"no_new_privs: {os.strerror(number)}")


def _set(option: int, value: int) -> int:
    """Call prctl(2); return 0, or -1 with the error in `ctypes.get_errno()`."""
    if sys.platform != "linux":
        return 0
    arguments = (ctypes.c_ulong(each) for each in (value, 0, 0, 0))
    result: int = ctypes.CDLL(None, use_errno=True).prctl(option, *arguments)
    return result
