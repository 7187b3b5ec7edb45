"""What comes before, between and besides whole mails on one connection."""

import re

import pytest

from ..mails import RECIPIENT, SENDER, mail, stored
from ..postfix import submit
from .conftest import Mta, Seen
from .letters import asking, delivered

pytestmark = pytest.mark.integration


def test_the_second_mail_is_untouched_by_what_was_done_to_the_first(mta: Mta, seen: Seen) -> None:
    expression = (
        "Accept(AddHeader('X-Added', 'yes'), DeleteHeader('X-Four', 2), ReplaceBody(b'new\\r\\n'),"
        " ChangeSender('new@example.net'), AddRecipient('added@example.com'))"
    )
    second = mail("second")
    with mta.client() as client:
        answers = [
            submit(client, asking(expression), recipients=["one@example.com"]),
            submit(client, second, recipients=["two@example.com"]),
        ]
    assert [answer.code for answer in answers] == [250, 250], mta.log()
    changed, untouched = mta.wait_delivered(2)
    added = ["X-Added: yes"]
    assert changed.message == delivered(expression, {"X-Four: two": None}, added, body=b"new\r\n")
    assert untouched.message == stored(second)
    assert (untouched.sender, untouched.recipients) == (SENDER, ("two@example.com",))
    assert seen.envelope("second")["recipients"] == ["two@example.com"]


@pytest.mark.parametrize("verdict", ["Reject('no')", "TempFail('later')", "Discard()"])
def test_the_second_mail_is_untouched_by_the_refusal_of_the_first(
    mta: Mta, seen: Seen, verdict: str
) -> None:
    with mta.client() as client:
        submit(client, asking(verdict))
        answer = submit(client, mail("second"))
    assert answer.code == 250, mta.log()
    [delivery] = mta.wait_delivered(1)
    assert delivery.message == stored(mail("second"))
    assert seen.message("second") == mail("second")


def test_what_was_reset_is_forgotten(mta: Mta, seen: Seen) -> None:
    with mta.client() as client:
        client.ehlo()
        client.mail("reset@example.org")
        client.rcpt("reset@example.com")
        client.rset()
        client.mail("reset@example.org")
        client.rset()
        client.rset()
        answer = submit(client, mail("after reset"))
    assert answer.code == 250, mta.log()
    [delivery] = mta.wait_delivered(1)
    assert (delivery.sender, delivery.recipients) == (SENDER, (RECIPIENT,))
    envelope = seen.envelope("after reset")
    assert (envelope["sender"], envelope["recipients"]) == (SENDER, [RECIPIENT])


def test_a_refused_recipient_among_three(mta: Mta, seen: Seen) -> None:
    recipients = ["one@example.com", "ghost@example.com", "three@example.com"]
    with mta.client() as client:
        answer = submit(client, mail("for two"), recipients=recipients)
    assert answer.code == 250, mta.log()
    [(refused, (code, text))] = answer.refused.items()
    assert (refused, code) == ("ghost@example.com", 550)
    # Sendmail puts the address in front.
    assert re.fullmatch(r"5\.1\.1 (<.*>\.\.\. )?no such user: ghost@example\.com", text)
    [delivery] = mta.wait_delivered(1)
    assert delivery.recipients == ("one@example.com", "three@example.com")
    assert seen.envelope("for two")["recipients"] == ["one@example.com", "three@example.com"]


def test_refused_recipients_alone_make_no_mail(mta: Mta, seen: Seen) -> None:
    with mta.client() as client:
        client.ehlo()
        client.mail(SENDER)
        assert client.rcpt("ghost@example.com")[0] == 550
        assert client.rcpt("ghost@example.net")[0] == 550
        assert client.docmd("DATA")[0] in (503, 554)
        assert client.rcpt(RECIPIENT)[0] == 250
        assert client.data(mail("after all"))[0] == 250
    [delivery] = mta.wait_delivered(1)
    assert delivery.recipients == (RECIPIENT,)
    assert seen.names() == {"after all"}


def test_an_unknown_command_inside_a_transaction_changes_nothing(mta: Mta, seen: Seen) -> None:
    with mta.client() as client:
        client.ehlo()
        client.mail(SENDER)
        reply = client.docmd("XYZZY", "plugh")
        assert client.rcpt(RECIPIENT)[0] == 250
        client.docmd("PLUGH")
        assert client.data(mail("known"))[0] == 250
    assert reply == (502, b"5.5.1 we do not know it either"), mta.log()
    # Postfix shows the whole line from 3.10 on, Sendmail always does.
    assert seen.unknown() == "PLUGH"
    assert seen.envelope("known")["recipients"] == [RECIPIENT]
    assert len(mta.wait_delivered(1)) == 1


def test_the_last_greeting_counts(mta: Mta, seen: Seen) -> None:
    with mta.client() as client:
        client.ehlo("first.example.test")
        client.helo("second.example.test")
        answer = submit(client, mail("greeted"))
    assert answer.code == 250, mta.log()
    assert seen.envelope("greeted")["helo"] == "second.example.test"
    assert len(mta.wait_delivered(1)) == 1


def test_a_greeting_inside_a_transaction_ends_it(mta: Mta, seen: Seen) -> None:
    with mta.client() as client:
        client.ehlo("first.example.test")
        client.mail("reset@example.org")
        client.rcpt("reset@example.com")
        client.ehlo("second.example.test")
        answer = submit(client, mail("greeted"))
    assert answer.code == 250, mta.log()
    wanted = {"sender": SENDER, "recipients": [RECIPIENT], "helo": "second.example.test"}
    assert seen.envelope("greeted") == wanted
    assert len(mta.wait_delivered(1)) == 1


def test_a_client_that_is_lost_inside_a_mail_leaves_nothing(mta: Mta, seen: Seen) -> None:
    client = mta.client()
    client.ehlo()
    client.mail("lost@example.org")
    client.rcpt(RECIPIENT)
    client.docmd("DATA")
    client.send(b"Subject: half a ma")
    client.close()
    assert mta.send(mail("whole")).code == 250
    assert len(mta.wait_delivered(1)) == 1
    assert seen.names() == {"whole"}
