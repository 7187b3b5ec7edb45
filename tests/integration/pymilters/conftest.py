"""Each script runs under each runner, behind the same Postfix, with the same mails."""

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Sockets
from ..daemon import Daemon
from ..mails import RECIPIENT, SENDER
from ..postfix import Postfix
from . import scripts
from .plain import Plain
from .scripts import CannotInstall, Environment, Script

#: `with runner(script, cwd):` serves the script's mail inside the `with`.
Runner = Callable[[Script, Path], AbstractContextManager[Any]]


@pytest.fixture(scope="session")
def environment(request: pytest.FixtureRequest) -> Environment:
    """pymilter and the milters; where they cannot be installed the tests are skipped, but in CI."""
    assert request.config.cache is not None
    try:
        return scripts.install(Path(request.config.cache.mkdir("pymilters")))
    except CannotInstall as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI must run the pymilter tests: {error}")
        pytest.skip(f"pymilter cannot be installed: {error}")


@dataclass(frozen=True)
class Runners:
    """Two ways to run the same script."""

    environment: Environment

    def plain(self, script: Script, cwd: Path) -> Plain:
        """pymilter itself, in one process."""
        command = [str(self.environment.python), str(script.program), *script.arguments]
        return Plain(command, listen=script.listen, cwd=cwd, env=script.env)

    def sharded(self, script: Script, cwd: Path, workers: int = 2) -> Daemon:
        """Our daemon. The socket is the script's own; Postfix's user has to write to it."""
        return Daemon(
            *("--workers", str(workers), "--socket-mode", "666"),
            *("--pymilter", str(script.program), "--", *script.arguments),
            cwd=cwd,
            env=script.env,
            python=str(self.environment.python),
        )

    def one_worker(self, script: Script, cwd: Path) -> Daemon:
        """Ours with one worker, so that one process writes what a script writes down."""
        return self.sharded(script, cwd, workers=1)


@pytest.fixture(scope="session")
def runners(environment: Environment) -> Runners:
    return Runners(environment)


@pytest.fixture(params=["plain", "sharded"])
def runner(request: pytest.FixtureRequest, runners: Runners) -> Runner:
    found: Runner = getattr(runners, request.param)
    return found


@dataclass(frozen=True)
class Mail:
    """What a client hands over."""

    raw: bytes
    sender: str = SENDER
    recipients: tuple[str, ...] = (RECIPIENT,)


@dataclass(frozen=True)
class Fate:
    """What became of a mail: the answer to the client without its queue id, and what arrived."""

    stage: str
    code: int
    text: str
    sender: str | None = None
    recipients: tuple[str, ...] = ()
    message: bytes | None = None


def fates(postfix: Postfix, mails: Mapping[str, Mail]) -> dict[str, Fate]:
    """Sends each mail on a connection of its own; the fates by the names of the mails."""
    return {name: _fate(postfix, mail) for name, mail in mails.items()}


def _fate(postfix: Postfix, mail: Mail) -> Fate:
    postfix.clear()
    answer = postfix.send(
        mail.raw, sender=mail.sender, recipients=mail.recipients, service="pymilter"
    )
    if answer.code != 250:
        return Fate(answer.stage, answer.code, answer.text)
    [delivery] = postfix.wait_delivered(1)
    text = answer.text.replace(delivery.queue_id, "ID")
    arrived = (delivery.sender, delivery.recipients, delivery.message)
    return Fate(answer.stage, answer.code, text, *arrived)


@pytest.fixture
def listen(sockets: Sockets) -> str:
    """Where Postfix's service `pymilter` looks for its milter."""
    return sockets.pymilter
