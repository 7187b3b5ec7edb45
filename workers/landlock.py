"""Landlock: restricts the files that a thread may use, and the processes that it may reach.

The kernel's interface version (ABI) says what can be restricted; only known rights are requested.
A restricted operation that is not allowed fails with EACCES (signals and abstract sockets: EPERM).
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Mapping
from contextlib import suppress
from enum import IntFlag

# The numbers of the system calls are the same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446

_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_RULESET = struct.Struct("=QQQ")  # rights on files, on the network, scopes
_PATH_BENEATH = struct.Struct("=Qi")


class Right(IntFlag):
    """A right on a file, or on everything below a directory."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


# The ABI that introduced a right; the other rights have existed since version 1.
_SINCE = {Right.REFER: 2, Right.TRUNCATE: 3, Right.IOCTL_DEV: 5}

READ = Right.READ_FILE | Right.READ_DIR
RUN = READ | Right.EXECUTE
# Neither devices, nor sockets, nor symbolic links, which could lead another program astray.
WRITE = (
    READ
    | Right.WRITE_FILE
    | Right.TRUNCATE
    | Right.MAKE_REG
    | Right.MAKE_DIR
    | Right.REMOVE_FILE
    | Right.REMOVE_DIR
    | Right.REFER
)
_OF_A_FILE = Right.EXECUTE | Right.WRITE_FILE | Right.READ_FILE | Right.TRUNCATE | Right.IOCTL_DEV

_TCP_SINCE = 4
_BIND_TCP, _CONNECT_TCP = 1 << 0, 1 << 1

# Abstract UNIX sockets and signals, both of processes outside.
SCOPES_SINCE = 6
_ABSTRACT_SOCKETS, _SIGNALS = 1 << 0, 1 << 1

# Turns audit logging off: a compromised worker could fill the kernel's audit log.
_LOGGING_SINCE = 7
_LOG_OFF = 1 << 0

# Restricts all threads of the process, not only the calling one.
ALL_THREADS_SINCE = 8
_ALL_THREADS = 1 << 3

_libc = ctypes.CDLL(None, use_errno=True)


def abi(most: int | None = None) -> int:
    """Return the version of the kernel's interface, at most `most`; 0 without Landlock."""
    try:
        version = _call(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION)
    except OSError:  # not compiled in, switched off, or forbidden by a container
        return 0
    return version if most is None else min(version, most)


def restrict(paths: Mapping[str, Right], version: int, *, network: bool) -> None:
    """Restrict this thread to `paths`, with the interface's `version`, which must not be 0.

    Threads and processes that it starts inherit this; the other threads of the process are
    restricted from version 8 on. Paths that are missing or not accessible are skipped. TCP is
    forbidden without `network`. Call `prctl.set_no_new_privileges` before. Raise OSError where
    the kernel refuses.
    """
    known = _known(version)
    tcp = _BIND_TCP | _CONNECT_TCP if version >= _TCP_SINCE and not network else 0
    scopes = _ABSTRACT_SOCKETS | _SIGNALS if version >= SCOPES_SINCE else 0
    # An older kernel takes a longer structure than its own if the rest of it is zero.
    attributes = _RULESET.pack(known, tcp, scopes)
    ruleset = _call(_CREATE_RULESET, attributes, len(attributes), 0)
    try:
        for path, rights in paths.items():
            _allow(ruleset, path, rights & known)
        flags = _LOG_OFF if version >= _LOGGING_SINCE else 0
        flags |= _ALL_THREADS if version >= ALL_THREADS_SINCE else 0
        _call(_RESTRICT_SELF, ruleset, flags)
    finally:
        os.close(ruleset)


def _known(version: int) -> Right:
    known = Right(0)
    for right in Right:
        if version >= _SINCE.get(right, 1):
            known |= right
    return known


def _allow(ruleset: int, path: str, rights: Right) -> None:
    with suppress(FileNotFoundError, PermissionError, NotADirectoryError):
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(fd).st_mode):
                rights &= _OF_A_FILE
            _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, _PATH_BENEATH.pack(rights, fd), 0)
        finally:
            os.close(fd)


def _call(number: int, *arguments: int | bytes | None) -> int:
    wide = [
        ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments
    ]
    result: int = _libc.syscall(ctypes.c_long(number), *wide)
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"Landlock: {os.strerror(error)}")
    return result
