"""Changed recipients and senders: who gets the mail, and who hears of it."""

import pytest

from ..mails import SENDER
from ..postfix import Delivery, Postfix
from ..sendmail import Sendmail
from .conftest import Mta
from .letters import asking, delivered

pytestmark = pytest.mark.integration

TWO = ("one@example.com", "two@example.com")


@pytest.mark.parametrize("form", ["{}", "<{}>"])
@pytest.mark.parametrize(
    ("action", "recipients"),
    [
        ("AddRecipient('{}')", [*TWO, "new@example.com"]),
        ("AddRecipient('{}', ('NOTIFY=NEVER',))", [*TWO, "new@example.com"]),
        ("DeleteRecipient('{}')", ["one@example.com"]),
    ],
)
def test_recipients_are_added_and_deleted(
    mta: Mta, action: str, recipients: list[str], form: str
) -> None:
    address = form.format("new@example.com" if action.startswith("Add") else "two@example.com")
    expression = f"Accept({action.format(address)})"
    delivery = mta.deliver(asking(expression), recipients=TWO)
    assert sorted(delivery.recipients) == sorted(recipients)
    assert delivery.sender == SENDER
    assert delivery.message == delivered(expression)


def test_a_mail_without_recipients_is_accepted_and_gone(mta: Mta) -> None:
    answer = mta.send(asking(f"Accept(*map(DeleteRecipient, {TWO}))"), recipients=TWO)
    assert (answer.stage, answer.code) == ("eom", 250), f"{answer}\n{mta.log()}"
    assert mta.wait_delivered(0) == []


@pytest.mark.parametrize(
    ("argument", "sender"),
    [
        ("'new@example.net'", "new@example.net"),
        ("'<new@example.net>'", "new@example.net"),
        ("''", ""),
        ("'<>'", ""),
        ("'new@example.net', ('RET=HDRS', 'ENVID=abc')", "new@example.net"),
    ],
)
def test_the_sender_is_changed(mta: Mta, argument: str, sender: str) -> None:
    expression = f"Accept(ChangeSender({argument}))"
    delivery = mta.deliver(asking(expression))
    assert delivery.sender == sender
    assert delivery.message == delivered(expression)


def test_a_null_sender_can_be_given_a_name(mta: Mta) -> None:
    delivery = mta.deliver(asking("Accept(ChangeSender('new@example.net'))"), sender="")
    assert delivery.sender == "new@example.net"


PARAMETERS = (
    "Accept(AddRecipient('new@example.com', ('NOTIFY=SUCCESS', 'ORCPT=rfc822;old@example.com')),"
    " ChangeSender('new@example.net', ('RET=HDRS', 'ENVID=abc')){more})"
)


@pytest.mark.usefixtures("daemon")
def test_postfix_keeps_the_parameters_of_added_recipients_and_senders(postfix: Postfix) -> None:
    """It sends no notice of success for a recipient of a milter, but its queue has it all."""
    answer = postfix.send(asking(PARAMETERS.format(more=", Quarantine('look')")), service="mtas")
    assert (answer.stage, answer.code) == ("eom", 250), f"{answer}\n{postfix.log()}"
    [held] = postfix.wait_held(1)
    records = postfix._run("postcat", "-eq", held.queue_id).decode()
    assert "\nnamed_attribute: envelope_id=abc\nnamed_attribute: ret_flags=2\n" in records
    assert (
        "\nnamed_attribute: notify_flags=2\n"
        "named_attribute: dsn_orig_rcpt=rfc822;old@example.com\n"
        "original_recipient: new@example.com\n"
    ) in records


@pytest.mark.usefixtures("daemon")
def test_sendmail_obeys_the_parameters_of_added_recipients_and_senders(
    running_sendmail: Sendmail,
) -> None:
    """The new sender is told that the added recipient has got the mail, and under which id."""
    running_sendmail.clear()
    answer = running_sendmail.send(asking(PARAMETERS.format(more="")))
    assert (answer.stage, answer.code) == ("eom", 250), f"{answer}\n{running_sendmail.log()}"
    notice, mail = sorted(running_sendmail.wait_delivered(2), key=_is_mail)
    assert sorted(mail.recipients) == ["new@example.com", "recipient@example.com"]
    assert (notice.sender, notice.recipients) == ("MAILER-DAEMON", ("new@example.net",))
    assert b"\nOriginal-Envelope-Id: abc\n" in notice.raw
    assert b"\nOriginal-Recipient: rfc822;old@example.com\n" in notice.raw
    assert b"\nThe original body." not in notice.raw


def _is_mail(delivery: Delivery) -> bool:
    return b"X-Ask" in delivery.raw.partition(b"\n\n")[0]
