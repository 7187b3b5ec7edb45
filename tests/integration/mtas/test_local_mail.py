"""Mail that does not come by SMTP, as Postfix shows it to its non_smtpd_milters."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ..conftest import Sockets
from ..mails import RECIPIENT
from ..postfix import _SEARCH_PATH, Postfix, require_postfix
from .conftest import Seen
from .letters import asking, delivered

pytestmark = pytest.mark.integration

SUBMIT_TIMEOUT = 30.0
#: What Postfix puts on top of local mail.
RECEIVED = re.compile(rb"\AReceived: by [^\n]*\n(?:[ \t][^\n]*\n)*")


@pytest.fixture(scope="module")
def local_postfix(common_ground: Path, sockets: Sockets) -> Iterator[Postfix]:
    require_postfix()
    settings = {"non_smtpd_milters": sockets.mtas}
    with Postfix(common_ground / "local-postfix", settings=settings) as instance:
        yield instance


@pytest.fixture
def mta(local_postfix: Postfix, daemon: object) -> Postfix:
    local_postfix.clear()
    return local_postfix


def submit_locally(mta: Postfix, message: bytes, sender: str, *recipients: str) -> None:
    """What a program on the machine does: `sendmail -f sender recipient ...`."""
    program = shutil.which("sendmail", path=_SEARCH_PATH)
    assert program is not None
    lines = message.replace(b"\r\n", b"\n")
    arguments = [program, "-C", str(mta.config), "-i", "-f", sender, "--", *recipients]
    subprocess.run(arguments, input=lines, timeout=SUBMIT_TIMEOUT, check=True)


def wait_log(mta: Postfix, text: str) -> str:
    deadline = time.monotonic() + SUBMIT_TIMEOUT
    while text not in (log := mta.log()):
        assert time.monotonic() < deadline, log
        time.sleep(0.02)
    return log


@pytest.mark.parametrize("sender", ["me@example.org", ""])
def test_it_is_filtered_like_any_other(mta: Postfix, seen: Seen, sender: str) -> None:
    expression = "Accept(AddHeader('X-Four', '5'), DeleteHeader('X-Four', 2))"
    submit_locally(mta, asking(expression), sender, RECIPIENT, "other@example.com")
    [delivery] = mta.wait_delivered(1)
    message = RECEIVED.sub(b"", delivery.raw)
    assert message == delivered(expression, {"X-Four: two": None}, ["X-Four: 5"])
    assert (delivery.sender, len(delivery.recipients)) == (sender, 2)
    assert seen.envelope("original") == {
        "sender": sender,
        "recipients": [RECIPIENT, "other@example.com"],
        "helo": "localhost",
    }


@pytest.mark.parametrize("verdict", ["Discard()", "Accept(Quarantine('look'))"])
def test_it_can_be_discarded_or_held(mta: Postfix, seen: Seen, verdict: str) -> None:
    submit_locally(mta, asking(verdict), "me@example.org", RECIPIENT)
    mta.wait_held(1 if "Quarantine" in verdict else 0)
    wait_log(mta, "milter-hold" if "Quarantine" in verdict else "milter-discard")
    assert mta.wait_delivered(0) == []


def test_a_refused_recipient_keeps_the_whole_mail_in_the_queue(mta: Postfix) -> None:
    """To Postfix that is a mistake in the configuration: nobody is there to be told."""
    submit_locally(mta, asking("Accept()"), "me@example.org", RECIPIENT, "ghost@example.com")
    log = wait_log(mta, "message not accepted, try again later")
    assert "can't reject recipient in non-smtpd(8) submission" in log
    assert mta.wait_delivered(0) == []
    assert len(list((mta.queue / "maildrop").iterdir())) == 1
