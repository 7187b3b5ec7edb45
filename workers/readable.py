"""Which files a sandboxed worker may read: those of Python, of its libraries and of its milters.

A right that Landlock gives for a folder holds for all below it, and cannot be taken back for a
part. So a folder that has something hidden in it (the master's sockets, kept messages) is given
piece by piece, without that; and of a folder that is too wide, such as a home directory, only the
Python code that lies directly in it.
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

# What names are resolved and certificates checked with.
NETWORK = (
    *("/etc/resolv.conf", "/etc/hosts", "/etc/host.conf", "/etc/nsswitch.conf", "/etc/gai.conf"),
    *("/etc/services", "/etc/protocols", "/etc/ssl/certs", "/etc/pki/tls", "/etc/pki/ca-trust"),
)

# Names of files that Python imports.
_CODE = (".py", ".pyc", ".so", ".zip")


def readable(milters: Collection[str], hidden: Collection[str]) -> list[str]:
    """Files and folders that a process with the code of `milters` (files) needs to read.

    It must have imported them. Nothing of `hidden` is among these or below them.
    """
    hidden = [os.path.realpath(path) for path in hidden]
    milters = [os.path.realpath(path) for path in milters]
    folders = [*SYSTEM, *_prefixes(), *_search_path(milters), *map(os.path.dirname, milters)]
    found: list[str] = []
    covered: tuple[str, ...] = ()
    for place in (*folders, *_packages()):
        if f"{place}/".startswith(covered):  # most are: following links takes far longer
            continue
        path = os.path.realpath(place)
        if not f"{path}/".startswith(covered):
            found += _code_in(path) if is_wide(path) else _without(path, hidden)
            covered = tuple(f"{each}/" for each in found)
    return [*found, *(path for path in milters if not _is_in(path, found))]


def is_wide(folder: str) -> bool:
    """Whether it is the root, at the top of the file system (and not a system's), or in /home."""
    parent = os.path.dirname(folder)
    return folder not in SYSTEM and parent in ("/", "/home")


def _prefixes() -> Iterator[str]:
    yield from {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    yield from filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))


def _search_path(milters: Collection[str]) -> Iterator[str]:
    """Where modules are found; the current directory only if a milter was found there."""
    here = os.path.realpath(".")
    for place in map(os.path.realpath, filter(None, sys.path)):
        if place != here or any(_is_in(file, [here]) for file in milters):
            yield place


def _packages() -> Iterator[str]:
    """Packages and modules that were found elsewhere, as those of editable installs are."""
    yield os.path.dirname(__file__)  # in a checkout it is behind a symbolic link
    for name, module in list(sys.modules.items()):
        if "." not in name:
            with suppress(Exception):  # what stands in for a module may be anything
                yield from getattr(module, "__path__", None) or [module.__file__ or ""]


def _is_in(path: str, folders: Iterable[str]) -> bool:
    return f"{path}/".startswith(tuple(f"{each.rstrip('/')}/" for each in folders))


def _without(path: str, hidden: Collection[str]) -> Iterator[str]:
    """The path; if something hidden lies below it, all that lies beside that."""
    if not any(_is_in(each, [path]) for each in hidden):
        yield path
    elif path not in hidden:
        for entry in _entries(path):
            yield from _without(entry.path, hidden)


def _code_in(folder: str) -> Iterator[str]:
    for entry in _entries(folder):
        if entry.name.endswith(_CODE) or os.path.isfile(f"{entry.path}/__init__.py"):
            yield entry.path


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """What is in a folder, without symbolic links: they may lead anywhere."""
    with suppress(OSError), os.scandir(folder) as entries:
        return [entry for entry in entries if not entry.is_symlink()]
    return []
