"""Refusals in the milter's words: what the client hears, from both MTAs."""

import re
import smtplib
from contextlib import suppress

import pytest

from ..mails import RECIPIENT, mail
from ..postfix import submit
from .conftest import Mta
from .letters import asking

pytestmark = pytest.mark.integration

REFUSALS = pytest.mark.parametrize(
    ("name", "code", "text"),
    [
        ("percent", 550, "5.7.1 100 % of %s, 50 %% sure"),
        ("lines", 554, "5.6.0 first\n5.6.0 second\n5.6.0 third"),
        ("later", 450, "4.2.0 not now"),
    ],
)


def without_address(text: str) -> str:
    """Sendmail puts the address in front of a text of one line at MAIL and RCPT."""
    return re.sub(r"<[^>]*>\.\.\. ", "", text)


@REFUSALS
def test_at_the_end_of_a_message(mta: Mta, name: str, code: int, text: str) -> None:
    answer = mta.send(asking(f"REFUSALS[{name!r}]"))
    assert (answer.stage, answer.code, answer.text) == ("eom", code, text), mta.log()
    assert mta.wait_delivered(0) == []


@REFUSALS
def test_of_a_sender(mta: Mta, name: str, code: int, text: str) -> None:
    answer = mta.send(mail(), sender=f"{name}@example.org")
    assert (answer.stage, answer.code) == ("mail", code), mta.log()
    assert without_address(answer.text) == text


@REFUSALS
def test_of_a_recipient(mta: Mta, name: str, code: int, text: str) -> None:
    refused = f"{name}@example.com"
    answer = mta.send(mail(), recipients=[refused, RECIPIENT])
    assert (answer.stage, answer.code) == ("eom", 250), mta.log()
    assert answer.refused[refused][0] == code
    assert without_address(answer.refused[refused][1]) == text
    [delivery] = mta.wait_delivered(1)
    assert delivery.recipients == (RECIPIENT,)


@REFUSALS
def test_of_a_greeting_is_heard_with_the_next_command(
    mta: Mta, name: str, code: int, text: str
) -> None:
    with mta.client() as client:
        client.ehlo(f"{name}.helo.test")
        answer = submit(client, mail())
    assert answer.stage in ("mail", "rcpt"), mta.log()
    assert (answer.code, without_address(answer.text)) == (code, text)


def test_421_ends_the_connection(mta: Mta) -> None:
    client = mta.client()
    answer = submit(client, asking("REFUSALS['bye']"))
    assert (answer.code, answer.text) == (421, "4.3.2 go away"), mta.log()
    with client, pytest.raises(smtplib.SMTPServerDisconnected):
        client.noop()
    assert mta.wait_delivered(0) == []


def test_421_at_a_recipient_ends_the_connection(mta: Mta) -> None:
    client = mta.client()
    client.ehlo()
    client.mail("sender@example.org")
    code, text = client.rcpt("bye@example.com")
    assert (code, without_address(text.decode())) == (421, "4.3.2 go away"), mta.log()
    with suppress(smtplib.SMTPServerDisconnected), client:
        assert client.noop()[0] == 421


def test_an_unknown_command_is_refused_in_the_milters_words(mta: Mta) -> None:
    with mta.client() as client:
        client.ehlo()
        code, text = client.docmd("XYZZY", "plugh")
        answer = submit(client, mail())
    assert (code, text) == (502, b"5.5.1 we do not know it either"), mta.log()
    assert answer.code == 250
