"""What the sandbox has refused to a milter, and which option would allow it.

An exception says no more than that a permission was denied, and sometimes a path. So the path is
looked at as the sandbox sees it, and the lines of code that led there are searched for words.
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

# Frames from the innermost on whose code may say what was tried.
MAX_FRAMES = 12

# Exceptions that another was raised from.
MAX_CAUSES = 10

_PROGRAMS = re.compile(r"subprocess|multiprocessing|spawn|fork|exec[lv]|popen|os\.system", re.I)
_SOCKETS = re.compile(r"socket|connect|getaddrinfo|gethostby|urlopen|http|smtplib|ssl", re.I)
_WORDS = {"subprocess": _PROGRAMS, "network": _SOCKETS}

# Landlock has no say in these, so the sandbox never allows them.
_NEVER = re.compile(r"chmod|chown|utime|copystat|copy2|copymode|link|mkfifo|mknod|setxattr")


def hint(error: BaseException, allowed: Collection[str]) -> str:
    """A line for the log that says which option would allow what was refused; else empty.

    `allowed` are the operator's words of --sandbox-allow.
    """
    for cause in _causes(error):
        option = ""
        if isinstance(cause, socket.gaierror):  # a name that is looked up without a network
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
    """The option for the path, unless its own permissions would have refused it, too."""
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
    """The file, the function and the line of code of each frame, the innermost first."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]):
        line = linecache.getline(frame.filename, frame.lineno or 0)
        yield f"{os.path.basename(frame.filename)} {frame.name} {line}"


def _unless_allowed(what: str, allowed: Collection[str]) -> str:
    return "" if what in allowed else f"--sandbox-allow {what}"
