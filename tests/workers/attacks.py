"""What code in a worker may try against others: a program that enters a sandbox and tries it all.

`python attacks.py FOLDER SANDBOX [NAME]...`: SANDBOX are the arguments of `Sandbox` as JSON. FOLDER
has a `milter.py` in a folder of its own and `secret`, which that may not see. Prints what came of
each attempt, or of those that are named, as JSON: an error's name, or "done".
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import json
import mmap
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from sharded_milter import Milter
from sharded_milter.dialects.functions.dialect import FunctionDialect
from sharded_milter.workers.sandbox import Sandbox

_libc = ctypes.CDLL(None, use_errno=True)

#: Calls that no worker needs, and that harm others, or the kernel, or undo the sandbox. With
#: arguments that are nonsense: what is not refused says EINVAL, EFAULT, EBADF, or does nothing.
CALLS = (
    "io_uring_setup", "io_uring_enter", "userfaultfd", "bpf", "perf_event_open", "keyctl",
    "add_key", "request_key",
    "process_vm_readv", "process_vm_writev", "pidfd_open", "pidfd_getfd", "pidfd_send_signal",
    "kcmp",
    "process_madvise", "process_mrelease", "ptrace", "open_by_handle_at", "name_to_handle_at",
    "mount", "umount2", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick",
    "mount_setattr", "pivot_root",
    "chroot", "unshare", "setns", "personality",
    "execve", "execveat", "fork", "vfork",
    "socket", "connect", "bind", "listen", "accept", "accept4", "setsockopt",
    "chmod", "fchmod", "fchmodat", "chown", "fchown", "lchown", "fchownat", "utime", "utimes",
    "utimensat", "futimesat",
    "setxattr", "lsetxattr", "fsetxattr", "removexattr", "truncate", "creat", "mknod", "mknodat",
    "symlink", "symlinkat",
    "unlink", "unlinkat", "rename", "renameat", "renameat2", "link", "linkat", "mkdir",
    "mkdirat", "rmdir",
    "inotify_init", "inotify_init1", "inotify_add_watch", "fanotify_init", "fanotify_mark",
    "mq_open", "mq_unlink", "shmget", "shmat", "semget", "msgget", "msgsnd",
    "tkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "timer_create",
    "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr", "setpriority",
    "ioprio_set",
    "setrlimit", "setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid",
    "setgroups", "setfsuid", "setsid", "setpgid",
    "capset", "migrate_pages", "move_pages", "mbind", "set_mempolicy", "mlockall",
    "memfd_secret",
    "landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self", "seccomp",
    "init_module", "finit_module", "delete_module", "kexec_load", "reboot", "swapon", "swapoff",
    "acct", "quotactl", "syslog",
    "settimeofday", "clock_settime", "adjtimex", "sethostname", "setdomainname", "vhangup",
    "iopl", "ioperm",
    "lookup_dcookie", "nfsservctl", "uselib", "modify_ldt",
)  # fmt: skip

#: A process of the same user that hides its memory, as master and workers do.
#: A process in the sandbox can make none.
PAIR = socket.socketpair()

VICTIM = """
import sys
from sharded_milter.prctl import hide_memory
hide_memory()
print("ready", flush=True)
sys.stdin.read()
"""

#: What is as if the kernel were too old for it.
TOO_NEW = ("clone3", "openat2")


class Ground(NamedTuple):
    """Where the attempts are made."""

    folder: Path
    victim: int  # a process of the same user, outside the sandbox
    socket: str  # of a server of the same user
    abstract: bytes  # the same, without a file
    may_fork: bool  # so that bare calls would leave a copy of this process


def call(name: str, *arguments: Any) -> int:
    """Makes a system call by its name."""
    number = _resolve(name)
    if number < 0:
        raise PermissionError(errno.EPERM, f"no {name} here")
    ctypes.set_errno(0)
    result: int = _libc.syscall(ctypes.c_long(number), *map(_wide, arguments))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _wide(argument: Any) -> Any:
    return ctypes.c_long(argument) if isinstance(argument, int) else argument


_library = ctypes.CDLL("libseccomp.so.2")


def _resolve(name: str) -> int:
    return int(_library.seccomp_syscall_resolve_name(name.encode()))


def attempts(ground: Ground) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every attempt by its name."""
    folder, victim = ground.folder, ground.victim
    secret, own = folder / "secret", folder / "milter" / "milter.py"
    for name in CALLS if not ground.may_fork else ():
        yield f"call {name}", partial(call, name, -1, -1, -1, -1, -1, -1)
    # Files
    yield "read a file", secret.read_bytes
    yield "list a folder", lambda: os.listdir(folder)
    yield "read /etc/passwd", lambda: Path("/etc/passwd").read_bytes()
    yield "read the victim's command", lambda: Path(f"/proc/{victim}/cmdline").read_bytes()
    yield "list the victim's descriptors", lambda: os.listdir(f"/proc/{victim}/fd")
    yield "open the victim's memory", lambda: Path(f"/proc/{victim}/mem").open("rb+").close()
    yield "list processes", lambda: os.listdir("/proc")
    yield "write the milter's file", lambda: own.open("a").close()
    yield "truncate by reading", lambda: os.close(os.open(own, os.O_RDONLY | os.O_TRUNC))
    yield "make a file", lambda: (folder / "new").touch()
    yield "make a nameless file", lambda: os.close(os.open("/tmp", os.O_TMPFILE | os.O_RDWR))
    yield "make a temporary file", tempfile.TemporaryFile
    yield "make shared memory", lambda: Path("/dev/shm/sharded-milter-attack").touch()
    yield "change a file's mode", lambda: own.chmod(0o666)
    yield "change a file's mode by descriptor", lambda: _fchmod(own)
    yield "change a file's times", lambda: os.utime(own)
    yield "remove a file", lambda: own.with_name("other").unlink()
    yield "rename a file", lambda: own.rename(own.with_name("new")).rename(own)
    yield "link a file", lambda: own.with_name("hard").hardlink_to(own)
    yield "link a file softly", lambda: own.with_name("soft").symlink_to(own)
    yield "steer itself by /proc", lambda: Path("/proc/self/oom_score_adj").write_text("500")
    yield "write its memory by /proc", lambda: Path("/proc/self/mem").open("rb+").close()
    # Processes
    yield "fork", _fork
    yield "run a program", lambda: subprocess.run(["/bin/true"], check=True)
    yield "run a program from memory", _run_memory
    yield "start a process in new namespaces", lambda: call("clone", 0x10000000 | 17, 0, 0, 0, 0)
    yield "start a sibling", lambda: _exit_if_child(call("clone", 0x8000 | 17, 0, 0, 0, 0))
    yield "kill the victim", lambda: os.kill(victim, signal.SIGCONT)
    yield "see whether the victim lives", lambda: os.kill(victim, 0)
    yield "kill everybody", lambda: os.kill(-1, 0)
    yield "kill a thread of the victim", lambda: call("tgkill", victim, victim, 0)
    yield "have a pipe send a signal to the victim", lambda: _own_a_pipe(victim)
    yield "read the victim's limits", lambda: call("prlimit64", victim, 7, None, _bytes(16))
    yield "set the victim's limits", lambda: call("prlimit64", victim, 7, _bytes(16, 1), None)
    yield "raise its own limits", lambda: call("prlimit64", 0, 7, _bytes(16, 1), None)
    yield "take priority", lambda: os.setpriority(os.PRIO_PROCESS, victim, 19)
    yield "be dumpable again", lambda: _prctl(4, 1)
    yield "huge pages", lambda: os.memfd_create("huge", os.MFD_HUGETLB)
    yield "see who traces", lambda: _prctl(0x59616D61, -1)
    # Sockets
    yield "IPv4", lambda: socket.socket(socket.AF_INET)
    yield "IPv6", lambda: socket.socket(socket.AF_INET6)
    yield "UNIX socket", lambda: _connect(ground.socket)
    yield "abstract UNIX socket", lambda: _connect(ground.abstract)
    yield "netlink", lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW)
    yield "raw packets", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
    yield "vsock", lambda: socket.socket(socket.AF_VSOCK)
    yield "kernel's cryptography", lambda: socket.socket(socket.AF_ALG)
    yield "datagram from a pair", lambda: _datagram(ground.socket + ".datagrams")
    if not ground.may_fork:
        yield "pair of sockets", socket.socketpair
    yield "pair of sequenced packets", lambda: socket.socketpair(type=socket.SOCK_SEQPACKET)
    # Terminals, devices
    yield "type on a terminal", lambda: fcntl.ioctl(0, 0x5412, b"x")  # TIOCSTI
    yield "own a descriptor by ioctl", lambda: fcntl.ioctl(0, 0x8901, struct.pack("i", victim))
    yield "open a terminal", lambda: os.open("/dev/tty", os.O_RDWR)
    yield "open a pseudo-terminal", lambda: os.open("/dev/ptmx", os.O_RDWR)
    # Other architectures' numbers
    if sys.maxsize > 2**32 and os.uname().machine == "x86_64":
        yield "x32", lambda: _checked(_libc.syscall(ctypes.c_long(0x40000000 + 39)))
        yield "32 bits", _int80


def _bytes(length: int, value: int = 0) -> Any:
    return ctypes.create_string_buffer(bytes([value]) * length, length)


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def _prctl(option: int, value: int) -> int:
    ctypes.set_errno(0)
    return _checked(_libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0))


def _exit_if_child(pid: int) -> None:
    if pid == 0:
        os._exit(0)


def _fork() -> None:
    pid = os.fork()
    _exit_if_child(pid)
    os.waitpid(pid, 0)


def _fchmod(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fchmod(fd, 0o666)
    finally:
        os.close(fd)


def _run_memory() -> None:
    fd = os.memfd_create("program")
    os.write(fd, b"#!/bin/sh\n")
    os.execve(fd, ["program"], {})


def _own_a_pipe(victim: int) -> None:
    fcntl.fcntl(PAIR[0], fcntl.F_SETOWN, victim)


def _connect(address: str | bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(address)


def _datagram(path: str) -> None:
    ours, _ = socket.socketpair(type=socket.SOCK_DGRAM)
    ours.sendto(b"x", path)


def _int80() -> None:
    """getpid() as a program of 32 bits calls it."""
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\xb8\x14\0\0\0\xcd\x80\xc3")
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    result = function()
    if result < 0:
        raise OSError(-result, os.strerror(-result))


def needs(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """What must go on working."""

    def in_a_thread() -> None:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(1))
        thread.start()
        thread.join()
        assert found

    def sealed_memory() -> None:
        from sharded_milter.ipc.memory import packed, view_of

        ours, theirs = PAIR
        memory = packed(b"x" * 1_000_000)
        socket.send_fds(ours, [b"x"], [memory.fd])  # type: ignore[union-attr]
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
        assert os.fstat(fds[0]).st_size == 1_000_000
        assert bytes(view_of(memory)[:1]) == b"x"

    def imports() -> None:
        import bz2
        import colorsys  # noqa: F401
        import mimetypes
        import sqlite3

        assert "café".encode("cp1250").decode("mac_latin2")
        mimetypes.init()
        sqlite3.connect(":memory:").execute("select 1")
        bz2.compress(b"x")

    def itself() -> None:
        os.kill(os.getpid(), 0)
        handled: list[int] = []
        signal.signal(signal.SIGUSR2, lambda number, _: handled.append(number))
        signal.raise_signal(signal.SIGUSR2)
        time.sleep(0)
        assert handled

    def null() -> None:
        with open(os.devnull, "r+b") as file:
            file.write(b"x")

    yield "threads", in_a_thread
    yield "sealed memory", sealed_memory
    yield "imports", imports
    yield "signals to itself", itself
    yield "the milter's folder", lambda: os.listdir(folder / "milter")
    yield "the milter's file", (folder / "milter" / "milter.py").read_bytes
    yield "/dev/null", null
    yield "its own state", Path("/proc/self/status").read_bytes
    yield "local time", lambda: time.strftime("%Z", time.localtime())
    yield "arrays", lambda: array.array("i", [1])


def outcome(attempt: Callable[[], object]) -> str:
    """The name of the error, or "done"."""
    try:
        attempt()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    except Exception as error:
        return repr(error)
    return "done"


def main(folder: Path, arguments: dict[str, Any], names: Sequence[str]) -> None:
    """Prints what came of everything."""
    forks = "subprocess" in arguments.get("allow", ())
    # The sandbox does not let it be killed: it ends when its standard input does, with us.
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == b"ready\n"
        with socket.socket(socket.AF_UNIX) as named, socket.socket(socket.AF_UNIX) as nameless:
            named.bind(f"{folder}/socket")
            nameless.bind(b"\0sharded-milter-attack-%d" % os.getpid())
            named.listen()
            nameless.listen()
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams:
                datagrams.bind(f"{folder}/socket.datagrams")
                ground = Ground(
                    folder, victim.pid, f"{folder}/socket", nameless.getsockname(), forks
                )
                milter = Milter("attacker", sandbox=True)
                milter.eom(lambda message: None)
                spec = f"{folder}/milter/milter.py:milter"
                report = Sandbox(**arguments).enter([FunctionDialect(milter)], [spec])
                found = {
                    name: outcome(attempt)
                    for name, attempt in attempts(ground)
                    if not names or name in names
                }
                if not names:
                    found |= {name: outcome(partial(call, name, 0, 0)) for name in TOO_NEW}
                kept = {name: outcome(need) for name, need in needs(folder)}
        print(json.dumps({"report": report.text, "found": found, "kept": kept}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
