"""A milter that needs longer than the MTA waits: PROGRESS keeps the MTA waiting, where it may."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ..conftest import Sockets, serving
from ..daemon import Daemon
from ..mails import mail, stored, write_milter
from ..postfix import Answer, Postfix, require_postfix
from ..sendmail import Sendmail

pytestmark = pytest.mark.integration

#: Longer than either MTA waits here for any answer.
SLOW = """
    import time
    from sharded_milter import Accept, AddHeader, Milter

    milter = Milter("slow")

    @milter.mail
    def mail(envelope):
        return None

    @milter.rcpt
    def rcpt(recipient, envelope):
        time.sleep(float(recipient.local))

    @milter.eom
    def eom(message):
        time.sleep(float(message.headers["X-Seconds"]))
        return Accept(AddHeader("X-Slow", "yes"))
"""
OFTEN, NEVER = "0.2", "600"


@pytest.fixture(scope="module")
def impatient_postfix(common_ground: Path, sockets: Sockets) -> Iterator[Postfix]:
    """It waits a second for every answer; PROGRESS restarts that."""
    require_postfix()
    milter = f"{{ {sockets.slow}, command_timeout=1s, content_timeout=1s }}"
    with Postfix(common_ground / "impatient-postfix", milters=[milter]) as instance:
        yield instance


@pytest.fixture(scope="module")
def impatient_sendmail(common_ground: Path, sockets: Sockets) -> Iterator[Sendmail]:
    """It waits two seconds for an answer, and counts whole ones; PROGRESS restarts that at eom."""
    with Sendmail(
        common_ground / "impatient-sendmail", milter=sockets.slow, timeouts="C:1m;S:10s;R:2s;E:5m"
    ) as instance:
        yield instance


def slow_daemon(sockets: Sockets, folder: Path, interval: str) -> Daemon:
    write_milter(folder, "slow.py", SLOW)
    return serving(
        "./slow.py:milter", "--progress-interval", interval, listen=sockets.slow, cwd=folder
    )


def slow_mail(seconds: float) -> bytes:
    return mail("patience", fields=[("X-Seconds", str(seconds))])


def marked(message: bytes) -> bytes:
    return stored(message).replace(b"\n\n", b"\nX-Slow: yes\n\n", 1)


def test_postfix_waits_at_every_stage(
    impatient_postfix: Postfix, sockets: Sockets, tmp_path: Path
) -> None:
    impatient_postfix.clear()
    message = slow_mail(2.5)
    with slow_daemon(sockets, tmp_path, OFTEN):
        answer = impatient_postfix.send(message, recipients=["1.6@example.com"])
    assert (answer.stage, answer.code) == ("eom", 250), f"{answer}\n{impatient_postfix.log()}"
    [delivery] = impatient_postfix.wait_delivered(1)
    assert delivery.message == marked(message)
    assert "warning" not in impatient_postfix.log()


def test_sendmail_waits_at_the_end_and_hears_nothing_before(
    impatient_sendmail: Sendmail, sockets: Sockets, tmp_path: Path
) -> None:
    impatient_sendmail.clear()
    message = slow_mail(3.5)
    with slow_daemon(sockets, tmp_path, OFTEN):
        answer = impatient_sendmail.send(message, recipients=["0.6@example.com"])
    assert (answer.stage, answer.code) == ("eom", 250), f"{answer}\n{impatient_sendmail.log()}"
    [delivery] = impatient_sendmail.wait_delivered(1)
    assert delivery.message == marked(message)
    assert "bogus" not in impatient_sendmail.log()


def test_without_progress_neither_would_have_waited(
    impatient_postfix: Postfix, impatient_sendmail: Sendmail, sockets: Sockets, tmp_path: Path
) -> None:
    mtas: list[Postfix | Sendmail] = [impatient_postfix, impatient_sendmail]

    def send(mta: Postfix | Sendmail) -> Answer:
        return mta.send(slow_mail(3.5), recipients=["0@example.com"])

    # They need not wait one after the other.
    with slow_daemon(sockets, tmp_path, NEVER), ThreadPoolExecutor(len(mtas)) as threads:
        answers = list(threads.map(send, mtas))
    assert [(answer.stage, answer.code) for answer in answers] == [("eom", 451), ("eom", 451)]
