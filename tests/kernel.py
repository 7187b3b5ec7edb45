"""What tests of the sandbox need of the machine."""

import os

import pytest

from sharded_milter.workers import landlock, seccomp


def required() -> None:
    """Skips the test where the machine cannot have a whole sandbox; with CI=true that fails it."""
    try:
        seccomp.library()
        missing = "" if landlock.abi() else "Landlock"
    except seccomp.Unavailable as error:
        missing = str(error)
    if missing and os.environ.get("CI") == "true":
        pytest.fail(f"there is no {missing}")
    if missing:
        pytest.skip(f"there is no {missing}")
