"""Hints for the log: the option that would allow an operation which the sandbox has refused.

An exception only says that permission was denied, and sometimes has a path. So the path is checked
inside the sandbox, and the lines of code in the traceback are searched for words.
"""

from __future__ import annotations

import errno
import linecache
import os
import re
import socket
import traceback
from collections.abc import Collection, Iterator
from contextlib import suppress

# Frames that are searched, from the innermost on.
MAX_FRAMES = 12

# Exceptions in a chain of causes that are searched.
MAX_CAUSES = 10

_PROGRAMS = re.compile(r"subprocess|multiprocessing|spawn|fork|exec[lv]|popen|os\.system", re.I)
_SOCKETS = re.compile(r"socket|connect|getaddrinfo|gethostby|urlopen|http|smtplib|ssl", re.I)
_WORDS = {"subprocess": _PROGRAMS, "network": _SOCKETS}

# Landlock cannot restrict these, so the sandbox never allows them.
_NEVER = re.compile(r"chmod|chown|utime|copystat|copy2|copymode|link|mkfifo|mknod|setxattr")


def hint(error: BaseException, allowed: Collection[str]) -> str:
    """Return a line that names the option which would allow the operation, or an empty string.

    `allowed` has the values of --sandbox-allow.
    """
    for cause in _causes(error):
        option = ""
        if isinstance(cause, socket.gaierror):  # a name lookup without network access
            option = _unless_allowed("network", allowed)
        elif isinstance(cause, PermissionError) and cause.filename is None:
            option = _of_words(cause, allowed)
        elif isinstance(cause, PermissionError):
            tried = next(_code(cause), "")
            if _PROGRAMS.search(tried):
                option = _unless_allowed("subprocess", allowed)
            elif cause.errno == errno.EPERM and _NEVER.search(tried):
                return "the sandbox has refused this, and no option allows it"
            else:
                option = _of_path(cause)
        if option:
            return f"the sandbox has refused this; {option} would allow it"
    return ""


def _causes(error: BaseException) -> Iterator[BaseException]:
    found: BaseException | None = error
    for _ in range(MAX_CAUSES):
        if found is None:
            return
        yield found
        found = found.__cause__ or found.__context__


def _of_path(error: PermissionError) -> str:
    """Return the option for the error's path, unless file permissions also refuse it."""
    with suppress(OSError, TypeError, ValueError):
        path = os.path.abspath(os.fsdecode(error.filename))
        if os.path.exists(path) and os.access(path, os.R_OK) and not _opens(path):
            return f"--sandbox-read {path}"
        folder = path if os.path.isdir(path) else os.path.dirname(path)
        if os.access(path if os.path.exists(path) else folder, os.W_OK):
            return f"--sandbox-write {folder}"
    return ""


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _of_words(error: PermissionError, allowed: Collection[str]) -> str:
    for code in _code(error):
        for what, words in _WORDS.items():
            if words.search(code):
                return _unless_allowed(what, allowed)
    return ""


def _code(error: BaseException) -> Iterator[str]:
    """Yield file, function and line of code of each frame, the innermost first."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]):
        line = linecache.getline(frame.filename, frame.lineno or 0)
        yield f"{os.path.basename(frame.filename)} {frame.name} {line}"


def _unless_allowed(what: str, allowed: Collection[str]) -> str:
    return "" if what in allowed else f"--sandbox-allow {what}"
