"""Programs as an ordinary user, also where the tests run as root."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Debian's and others' `nobody`.
NOBODY = 65534

_USER = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")

#: Where Python lies in root's own home: all files can be read, nothing else is different.
_READER = ("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search")


@functools.cache
def as_ordinary_user() -> tuple[str, ...]:
    """What stands in front of a command so that an ordinary user runs it."""
    if os.getuid():
        return ()
    # By way of env: setpriv itself still finds what root can find.
    probe = [*_USER, "env", sys.executable, "-c", "import sharded_milter"]
    if subprocess.run(probe, capture_output=True, check=False, cwd="/").returncode == 0:
        return _USER
    return (*_USER, *_READER)


@contextmanager
def ordinary_folder() -> Iterator[Path]:
    """A folder of that user, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="ordinary-", dir="/tmp") as name:
        os.chmod(name, 0o755)
        if not os.getuid():
            os.chown(name, NOBODY, NOBODY)
        yield Path(name)
