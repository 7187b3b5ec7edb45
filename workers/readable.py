"""The files that a sandboxed worker may read: those of Python, of its libraries and its milters.

A right that Landlock grants for a folder holds for everything below it, and cannot be revoked for
a part. So of a folder with something hidden in it (the master's sockets, kept messages) each other
entry is granted, and of a folder that is too wide, such as a home directory, only the Python code
directly in it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress

SYSTEM = (
    *("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/gnu/store"),
    *("/etc/ld.so.cache", "/etc/localtime", "/etc/mime.types", "/etc/ssl/openssl.cnf"),
    *("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random"),
    *("/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu"),
)

# Files for resolving names and checking certificates.
NETWORK = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/gai.conf"),
    *("/etc/services", "/etc/protocols", "/etc/ssl/certs", "/etc/pki/tls", "/etc/pki/ca-trust"),
)

# Names of files that Python imports.
_CODE = (".py", ".pyc", ".so", ".zip")


def readable(milters: Collection[str], hidden: Collection[str]) -> list[str]:
    """Return files and folders that a process with the code of `milters` (files) must read.

    The process must have imported them. No path in `hidden` is returned or below a returned one,
    except the files of `milters` themselves.
    """
    hidden = [os.path.realpath(path) for path in hidden]
    milters = [os.path.realpath(path) for path in milters]
    folders = [*SYSTEM, *_prefixes(), *_search_path(milters), *map(os.path.dirname, milters)]
    found: list[str] = []
    covered: tuple[str, ...] = ()
    for place in (*folders, *_packages()):
        if f"{place}/".startswith(covered):  # most are, and following links takes far longer
            continue
        path = os.path.realpath(place)
        if not f"{path}/".startswith(covered):
            for each in _code_in(path) if is_wide(path) else [path]:
                found += _without(each, hidden)
            covered = tuple(f"{each}/" for each in found)
    return [*found, *(path for path in milters if not _is_in(path, found))]


def is_wide(folder: str) -> bool:
    """Return whether a folder is `/`, a non-system folder directly in `/`, or directly in /home."""
    parent = os.path.dirname(folder)
    return folder not in SYSTEM and parent in ("/", "/home")


def _prefixes() -> Iterator[str]:
    yield from {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    yield from filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))


def _search_path(milters: Collection[str]) -> Iterator[str]:
    """Yield the module search path; the current directory only if a milter is there."""
    here = os.path.realpath(".")
    for place in map(os.path.realpath, filter(None, sys.path)):
        if place != here or any(_is_in(file, [here]) for file in milters):
            yield place


def _packages() -> Iterator[str]:
    """Yield packages and modules outside of the search path, as in editable installs."""
    yield os.path.dirname(__file__)  # in a checkout it is behind a symbolic link
    for name, module in list(sys.modules.items()):
        if "." not in name:
            with suppress(Exception):  # an entry of sys.modules may be any object
                yield from getattr(module, "__path__", None) or [module.__file__ or ""]


def _is_in(path: str, folders: Iterable[str]) -> bool:
    return f"{path}/".startswith(tuple(f"{each.rstrip('/')}/" for each in folders))


def _without(path: str, hidden: Collection[str]) -> Iterator[str]:
    """Yield the path unless it is hidden, or what lies beside the hidden paths below it."""
    if _is_in(path, hidden):
        return
    if not any(_is_in(each, [path]) for each in hidden):
        yield path
    else:
        for entry in _entries(path):
            yield from _without(entry.path, hidden)


def _code_in(folder: str) -> Iterator[str]:
    for entry in _entries(folder):
        if entry.name.endswith(_CODE) or os.path.isfile(f"{entry.path}/__init__.py"):
            yield entry.path


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, without symbolic links, which may lead anywhere."""
    with suppress(OSError), os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.is_symlink()]
    return []
