"""Each test here runs twice: behind Postfix and behind Sendmail, which ask the same daemon."""

import json
import smtplib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Sockets, serving
from ..daemon import Daemon
from ..mails import RECIPIENT, SENDER, write_milter
from ..postfix import Answer, Delivery, HeldMail, Postfix
from ..sendmail import Sendmail

#: Writes down what it sees under the mail's subject, and does what the mail asks for: at eom as an
#: expression in X-Ask, before that by name.
LAB = """
    import json
    from pathlib import Path

    from sharded_milter import (
        Accept, AddHeader, AddRecipient, ChangeHeader, ChangeSender, DeleteHeader,
        DeleteRecipient, Discard, InsertHeader, Milter, Quarantine, Reject, ReplaceBody, TempFail,
    )

    SEEN = Path(__file__).with_name("seen")
    # Lines of 64 bytes: the first chunk on the wire ends between CR and LF, the second before CR.
    LARGE = (b"\\xe9" * 62 + b"\\r\\n") * 3200
    REFUSALS = {
        "percent": Reject("100 % of %s, 50 %% sure"),
        "lines": Reject("first\\nsecond\\nthird", code=554, xcode="5.6.0"),
        "later": TempFail("not now", code=450, xcode="4.2.0"),
        "bye": TempFail("go away", code=421, xcode="4.3.2"),
    }

    milter = Milter("lab")

    @milter.helo
    def helo(connection):
        return REFUSALS.get(connection.helo.removesuffix(".helo.test"))

    @milter.mail
    def mail(envelope):
        return REFUSALS.get(envelope.sender.local)

    @milter.rcpt
    def rcpt(recipient, envelope):
        if recipient.local == "ghost":
            return Reject(f"no such user: {recipient}", xcode="5.1.1")
        return REFUSALS.get(recipient.local)

    @milter.unknown
    def unknown(command, connection):
        (SEEN / "unknown").write_text(command)
        return Reject("we do not know it either", code=502, xcode="5.5.1")

    @milter.eom
    def eom(message):
        subject = message.headers["Subject"]
        envelope = {
            "sender": str(message.sender),
            "recipients": [str(recipient) for recipient in message.recipients],
            "helo": message.connection.helo,
        }
        (SEEN / f"{subject}.json").write_text(json.dumps(envelope))
        (SEEN / f"{subject}.eml").write_bytes(bytes(message))
        return eval(message.headers.get("X-Ask", "None"))
"""


@dataclass(frozen=True)
class Seen:
    """What the milter wrote down."""

    folder: Path

    def message(self, subject: str) -> bytes:
        return (self.folder / f"{subject}.eml").read_bytes()

    def envelope(self, subject: str) -> dict[str, Any]:
        envelope: dict[str, Any] = json.loads((self.folder / f"{subject}.json").read_text())
        return envelope

    def unknown(self) -> str:
        return (self.folder / "unknown").read_text()

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def names(self) -> set[str]:
        return {path.stem for path in self.folder.iterdir()}


@dataclass(frozen=True)
class Mta:
    """A running MTA which asks one milter about all its mail."""

    name: str
    instance: Postfix | Sendmail
    client: Callable[[], smtplib.SMTP]
    send_to_service: Callable[..., Answer]

    def send(
        self, message: bytes, *, sender: str = SENDER, recipients: Sequence[str] = (RECIPIENT,)
    ) -> Answer:
        """One mail on a connection of its own. The answer is returned, never raised."""
        return self.send_to_service(message, sender=sender, recipients=recipients)

    def deliver(
        self, message: bytes, *, sender: str = SENDER, recipients: Sequence[str] = (RECIPIENT,)
    ) -> Delivery:
        """The one delivery of a mail that has to be accepted."""
        answer = self.send(message, sender=sender, recipients=recipients)
        assert (answer.stage, answer.code) == ("eom", 250), f"{answer}\n{self.log()}"
        [delivery] = self.wait_delivered(1)
        return delivery

    def wait_delivered(self, count: int) -> list[Delivery]:
        return self.instance.wait_delivered(count)

    def wait_held(self, count: int) -> list[HeldMail]:
        return self.instance.wait_held(count)

    def log(self) -> str:
        return self.instance.log()


@pytest.fixture(scope="session")
def running_sendmail(common_ground: Path, sockets: Sockets) -> Iterator[Sendmail]:
    with Sendmail(common_ground / "sendmail", milter=sockets.mtas) as instance:
        yield instance


def mta_of(instance: Postfix | Sendmail, service: str) -> Mta:
    """Postfix asks the milter of the service, Sendmail the only one that it has."""
    if isinstance(instance, Sendmail):
        return Mta("sendmail", instance, instance.client, instance.send)
    client = partial(instance.client, service)
    return Mta("postfix", instance, client, partial(instance.send, service=service))


@pytest.fixture(scope="session", params=["postfix", "sendmail"])
def running_mta(request: pytest.FixtureRequest) -> Mta:
    return mta_of(request.getfixturevalue(f"running_{request.param}"), "mtas")


@pytest.fixture(scope="session")
def laboratory(sockets: Sockets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lab")
    (folder / "seen").mkdir()
    write_milter(folder, "lab.py", LAB)
    return folder


@pytest.fixture(scope="session")
def daemon(laboratory: Path, sockets: Sockets) -> Iterator[Daemon]:
    with serving("./lab.py:milter", listen=sockets.mtas, cwd=laboratory) as daemon:
        yield daemon


@pytest.fixture
def mta(running_mta: Mta, daemon: Daemon) -> Mta:
    """An MTA with an empty queue and an empty mailbox whose milter runs."""
    running_mta.instance.clear()
    return running_mta


@pytest.fixture
def seen(laboratory: Path) -> Seen:
    """What the milter sees during this test."""
    seen = Seen(laboratory / "seen")
    seen.clear()
    return seen
