"""A milter in this process for the load client."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sharded_milter.protocol.stages import Protocol

from .scripted import Scripted


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[Callable[..., Scripted]]:
    """Return a function that starts a scripted milter with given protocol bits."""
    started: list[Scripted] = []

    def start(protocol: Protocol, **script: object) -> Scripted:
        milter = Scripted(f"{tmp_path}/s{len(started)}", protocol, **script)  # type: ignore[arg-type]
        started.append(milter)
        return milter

    yield start
    for milter in started:
        milter.stop()
