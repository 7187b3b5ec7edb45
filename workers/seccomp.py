"""seccomp: restricts the system calls of a process; all that are not listed fail with EPERM.

The C library libseccomp builds the filter from names. It is called with ctypes: its own Python
binding is in no package index, and the one in the index (pyseccomp) has had no release since
January 2021 and starts a compiler to find the library.

The list has the calls that Python, the reactor and the channel to the master need, and calls that
cannot harm other processes. Landlock restricts paths; this filter restricts everything else.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import platform
import socket
from collections.abc import Iterable, Mapping
from ctypes import c_int, c_uint, c_uint32, c_uint64, c_void_p
from typing import Any, NamedTuple

LIBRARY = "libseccomp.so.2"

# Architectures whose system calls have the argument order that the rules below assume.
ARCHITECTURES = ("x86_64", "aarch64")

ALWAYS = (
    "read", "write", "readv", "writev", "pread64", "pwrite64", "preadv", "pwritev", "preadv2",
    "pwritev2", "lseek", "close", "close_range",
    "sendfile", "copy_file_range", "fsync", "fdatasync", "ftruncate", "fallocate", "fadvise64",
    "stat", "lstat", "fstat", "newfstatat", "statx", "access", "faccessat", "faccessat2",
    "readlink", "readlinkat", "statfs", "fstatfs",
    "getcwd", "chdir", "fchdir", "getdents", "getdents64", "umask", "flock", "dup", "dup2",
    "dup3", "pipe", "pipe2",
    "mmap", "munmap", "mprotect", "mremap", "madvise", "brk", "msync",
    "eventfd", "eventfd2", "timerfd_create", "timerfd_settime", "timerfd_gettime",
    "sendmsg", "recvmsg", "sendto", "recvfrom", "sendmmsg", "recvmmsg",
    "getsockname", "getpeername", "getsockopt", "shutdown",
    "epoll_create", "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "epoll_pwait2",
    "poll", "ppoll", "select", "pselect6",
    "futex", "futex_waitv", "futex_wake", "futex_wait", "futex_requeue", "set_robust_list",
    "get_robust_list",
    "set_tid_address", "rseq", "membarrier",
    "sched_yield", "sched_getaffinity", "sched_getparam", "sched_getscheduler",
    "sched_get_priority_max",
    "sched_get_priority_min", "getpriority", "getcpu",
    "nanosleep", "clock_nanosleep", "clock_gettime", "clock_getres", "gettimeofday", "time",
    "times",
    "getitimer", "setitimer", "alarm", "pause",
    "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "rt_sigtimedwait", "rt_sigpending",
    "rt_sigsuspend", "sigaltstack",
    "restart_syscall", "wait4", "waitid",
    "getpid", "gettid", "getppid", "getuid", "geteuid", "getgid", "getegid", "getresuid",
    "getresgid", "getgroups",
    "getpgid", "getpgrp", "getsid", "getrusage", "getrlimit", "sysinfo", "uname", "getrandom",
    "arch_prctl", "exit", "exit_group",
)  # fmt: skip

# These fail with ENOSYS, as in an old kernel: their arguments are in memory, which a filter cannot
# read. The C library then uses the older call, whose arguments the filter can check.
TOO_NEW = ("clone3", "openat2", "fchmodat2")

# Landlock restricts the paths. It cannot restrict changes of modes, owners and times: none is here.
WRITING = (
    "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat", "rename", "renameat", "renameat2",
    "link", "linkat", "sync_file_range",
)  # fmt: skip

NETWORK = ("connect", "bind", "setsockopt")

SUBPROCESS = ("execve", "fork", "vfork", "setsid", "setpgid")

_COMMANDS = (
    *(fcntl.F_DUPFD, fcntl.F_DUPFD_CLOEXEC, fcntl.F_GETFD, fcntl.F_SETFD),
    *(fcntl.F_GETFL, fcntl.F_SETFL, fcntl.F_GETLK, fcntl.F_SETLK, fcntl.F_SETLKW),
    *(36, 37, 38),  # F_OFD_GETLK, F_OFD_SETLK, F_OFD_SETLKW
    *(fcntl.F_ADD_SEALS, fcntl.F_GET_SEALS),
    1032,  # F_GETPIPE_SZ
)

# TCGETS, TCGETS2 (isatty), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Not TIOCSTI.
_IOCTLS = (0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)

# PR_SET_NAME, PR_GET_NAME (of a thread), PR_SET_VMA (names of memory). None can undo the sandbox.
_PRCTLS = (15, 16, 0x53564D41)

_CLONE_THREAD = 0x0001_0000
_CLONE_PARENT = 0x0000_8000
# New namespaces: CGROUP, UTS, IPC, USER, PID, NET, NS.
_CLONE_NAMESPACES = 0x7E02_0000

_MEMFD_FLAGS = 0x1B  # CLOEXEC, ALLOW_SEALING, NOEXEC_SEAL, EXEC

_SOCK_TYPE = 0xF
_IPV4_AND_6 = (socket.AF_INET, socket.AF_INET6)

_ALLOW = 0x7FFF_0000
_ERRNO = 0x0005_0000
_EQUAL, _MASKED_EQUAL = 4, 7
_BAD_ARCHITECTURE, _ALL_THREADS, _OPTIMIZE = 2, 4, 8  # attributes of a filter
_BINARY_TREE = 2


class Unavailable(Exception):
    """No filter can be installed; the text says what is missing."""


class Compare(ctypes.Structure):
    """A condition: an argument equals `a`, or, masked with `a`, equals `b`."""

    _fields_ = [("arg", c_uint), ("op", c_int), ("a", c_uint64), ("b", c_uint64)]


class Rule(NamedTuple):
    """A system call that is allowed when all comparisons hold."""

    call: str
    comparisons: tuple[Compare, ...] = ()


def equal(arg: int, value: int) -> Compare:
    """Return the condition that the argument equals the value."""
    return Compare(arg, _EQUAL, value, 0)


def masked(arg: int, mask: int, value: int) -> Compare:
    """Return the condition that the argument, masked, equals the value."""
    return Compare(arg, _MASKED_EQUAL, mask, value)


def rules(
    *, network: bool, subprocess: bool, writes: bool, files_restricted: bool, signals_scoped: bool
) -> list[Rule]:
    """Return the rules besides ALWAYS.

    `files_restricted` says that Landlock decides what may be opened, `writes` that there are
    places to write to, `signals_scoped` that Landlock keeps signals among this process and its
    children.
    """
    pid = os.getpid()
    found = [
        *_opening(for_writing=files_restricted or writes),
        *(Rule("fcntl", (equal(1, command),)) for command in _COMMANDS),
        *(Rule("ioctl", (equal(1, request),)) for request in _IOCTLS),
        *(Rule("prctl", (equal(0, option),)) for option in _PRCTLS),
        # Reading the process's own limits.
        *(Rule("prlimit64", (equal(0, who), equal(2, 0))) for who in (0, pid)),
        # Any flags but huge pages, which all processes share.
        Rule("memfd_create", (masked(1, 0xFFFF_FFFF & ~_MEMFD_FLAGS, 0),)),
        Rule(
            "clone",
            (
                masked(
                    0,
                    _CLONE_NAMESPACES | _CLONE_PARENT | (0 if subprocess else _CLONE_THREAD),
                    0 if subprocess else _CLONE_THREAD,
                ),
            ),
        ),
        *(Rule(call, (equal(0, pid),)) for call in ("kill", "tgkill")),
    ]
    if network or subprocess:
        # asyncio and multiprocessing need pairs. A process can fill one with descriptors until no
        # process of its user can pass any, so one without such needs has none. And an unconnected
        # datagram socket could send to any UNIX socket by its path.
        stream = masked(1, _SOCK_TYPE, socket.SOCK_STREAM)
        found.append(Rule("socketpair", (equal(0, socket.AF_UNIX), stream)))
    if subprocess:
        found += [Rule(call) for call in SUBPROCESS]
        if signals_scoped:  # else a milter cannot even end its own children
            found += [Rule("kill"), Rule("tgkill")]
    if network:
        found += [Rule(call) for call in NETWORK]
        found += [Rule("socket", (equal(0, family),)) for family in _IPV4_AND_6]
    if writes:
        found += [Rule(call) for call in WRITING]
    return found


def _opening(*, for_writing: bool) -> Iterable[Rule]:
    """Yield rules for opening without O_TRUNC, or for writing, for which Landlock needs the right.

    Landlock restricts truncation alone only from its third version on.
    """
    for call, flags in (("open", 1), ("openat", 2)):
        if not for_writing:
            mask = os.O_ACCMODE | os.O_CREAT | os.O_TRUNC
            yield Rule(call, (masked(flags, mask, os.O_RDONLY),))
            continue
        yield Rule(call, (masked(flags, os.O_ACCMODE | os.O_TRUNC, os.O_RDONLY),))
        for mode in (os.O_WRONLY, os.O_RDWR):
            yield Rule(call, (masked(flags, os.O_ACCMODE, mode),))


def library() -> Any:
    """Load and return libseccomp; raise Unavailable with the package to install."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise Unavailable(f"no filter for {machine}, only for {' and '.join(ARCHITECTURES)}")
    try:
        found = ctypes.CDLL(LIBRARY)
    except OSError:
        raise Unavailable(
            f"{LIBRARY} is not installed (Debian: libseccomp2, Fedora: libseccomp)"
        ) from None
    found.seccomp_init.restype = c_void_p
    found.seccomp_init.argtypes = [c_uint32]
    found.seccomp_release.argtypes = found.seccomp_load.argtypes = [c_void_p]
    found.seccomp_release.restype = None
    found.seccomp_attr_set.argtypes = [c_void_p, c_int, c_uint32]
    found.seccomp_syscall_resolve_name.argtypes = [ctypes.c_char_p]
    found.seccomp_rule_add_array.argtypes = [
        *(c_void_p, c_uint32, c_int, c_uint),
        ctypes.POINTER(Compare),
    ]
    return found


def restrict(found: Any, more: Iterable[Rule]) -> None:
    """Restrict all threads of this process with `library()`; raise Unavailable on failure."""
    refuse = _ERRNO | errno.EPERM
    context = found.seccomp_init(refuse)
    if not context:
        raise Unavailable("libseccomp makes no filter")
    try:
        for attribute, value in _ATTRIBUTES.items():
            found.seccomp_attr_set(context, attribute, value)
        for call in TOO_NEW:
            _add(found, context, _ERRNO | errno.ENOSYS, Rule(call))
        for rule in (*map(Rule, ALWAYS), *more):
            _add(found, context, _ALLOW, rule)
        failed = found.seccomp_load(context)
    finally:
        found.seccomp_release(context)
    if failed:
        raise Unavailable(f"the kernel takes no filter: {os.strerror(abs(failed))}")


_ATTRIBUTES: Mapping[int, int] = {
    # System calls of another architecture (32 bits, x32) are refused like all others.
    _BAD_ARCHITECTURE: _ERRNO | errno.EPERM,
    _ALL_THREADS: 1,
    _OPTIMIZE: _BINARY_TREE,
}

_UNKNOWN = -1  # to this version of libseccomp


def _add(found: Any, context: int, action: int, rule: Rule) -> None:
    number = found.seccomp_syscall_resolve_name(rule.call.encode())
    if number == _UNKNOWN:
        return
    comparisons = (Compare * len(rule.comparisons))(*rule.comparisons)
    failed = found.seccomp_rule_add_array(
        context, action, number, len(rule.comparisons), comparisons
    )
    if failed:
        raise Unavailable(f"libseccomp refuses the rule for {rule.call}: {os.strerror(-failed)}")
