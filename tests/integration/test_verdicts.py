"""What an author's milter says is what the client is told and what Postfix delivers."""

import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import pytest

from .conftest import Sockets, serving
from .daemon import Daemon
from .mails import RECIPIENT, SENDER, write_milter
from .postfix import Postfix, submit

pytestmark = [pytest.mark.integration, pytest.mark.each_python]

#: The mail names the verdict it wants: at eom as an expression in X-Ask, before that by address
#: or HELO name.
POLICY = """
    from sharded_milter import (
        Accept, AddHeader, AddRecipient, ChangeHeader, ChangeSender, DeleteHeader,
        DeleteRecipient, Discard, InsertHeader, Milter, Quarantine, Reject, ReplaceBody, TempFail,
    )

    VERDICTS = {
        "accept": Accept(), "discard": Discard(), "none": None,
        "reject": Reject("no, thank you"), "tempfail": TempFail("not now"),
    }
    milter = Milter("policy", macros={"eom": ["i"]})

    @milter.helo
    def helo(connection):
        return VERDICTS.get(connection.helo.removesuffix(".helo.test"))

    @milter.mail
    def mail(envelope):
        stage, _, verdict = envelope.sender.local.partition(".")
        return VERDICTS.get(verdict) if stage == "mail" else None

    @milter.rcpt(light=True)
    def rcpt(recipient, envelope):
        if recipient.local == "ghost":
            return Reject(f"no such user: {recipient}", xcode="5.1.1")
        return None

    @milter.data
    def data(envelope):
        stage, _, verdict = envelope.sender.local.partition(".")
        return VERDICTS.get(verdict) if stage == "data" else None

    @milter.eoh
    def eoh(envelope, headers):
        stage, _, verdict = envelope.sender.local.partition(".")
        return VERDICTS.get(verdict) if stage == "eoh" else None

    @milter.eom
    def eom(message):
        return eval(message.headers["X-Ask"])
"""


@pytest.fixture(scope="module")
def policy(
    running_postfix: Postfix, sockets: Sockets, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    folder = tmp_path_factory.mktemp("policy")
    write_milter(folder, "policy.py", POLICY)
    with serving("./policy.py:milter", listen=sockets.policy, cwd=folder) as daemon:
        yield daemon


def asking(expression: str) -> bytes:
    lines = [
        "From: sender@example.org",
        "X-Twice: first",
        "Subject: original",
        "X-Twice: second",
        f"X-Ask: {expression}",
        "",
        "The original body.",
        "",
    ]
    return "\r\n".join(lines).encode()


def asked(
    expression: str,
    changed: Mapping[str, str | None] = MappingProxyType({}),
    *,
    body: bytes = b"The original body.\n",
) -> bytes:
    """What is delivered of `asking(expression)`; each field can be replaced, or deleted by None."""
    fields: dict[str, str | None] = {
        "From": "From: sender@example.org",
        "X_Twice_1": "X-Twice: first",
        "Subject": "Subject: original",
        "X_Twice_2": "X-Twice: second",
        "X_Ask": f"X-Ask: {expression}",
        "added": None,
    }
    lines = [line for line in {**fields, **changed}.values() if line is not None]
    return "\n".join([*lines, "", ""]).encode() + body


@pytest.mark.parametrize(
    ("expression", "changes"),
    [
        ("None", {}),
        ("Accept()", {}),
        ("Accept(AddHeader('X-Added', 'yes'))", {"added": "X-Added: yes"}),
        ("Accept(AddHeader('X-Added', 'one\\n\\ttwo'))", {"added": "X-Added: one\n\ttwo"}),
        ("Accept(AddHeader('X-Added', 'gr\\u00fcn'))", {"added": "X-Added: grün"}),
        ("Accept(ChangeHeader('subject', 1, 'changed'))", {"Subject": "subject: changed"}),
        ("Accept(ChangeHeader('X-Twice', 2, 'changed'))", {"X_Twice_2": "X-Twice: changed"}),
        ("Accept(DeleteHeader('X-Twice'))", {"X_Twice_1": None}),
        ("Accept(DeleteHeader('X-Twice', 2))", {"X_Twice_2": None}),
        (
            "Accept(DeleteHeader('X-Twice', 1), DeleteHeader('X-Twice', 2))",
            {"X_Twice_1": None, "X_Twice_2": None},
        ),
        (
            "Accept(DeleteHeader('X-Twice', 1), ChangeHeader('X-Twice', 2, 'changed'))",
            {"X_Twice_1": None, "X_Twice_2": "X-Twice: changed"},
        ),
        ("Accept(ChangeHeader('X-Absent', 1, 'now here'))", {"added": "X-Absent: now here"}),
        ("Accept(DeleteHeader('X-Absent'))", {}),
    ],
)
@pytest.mark.usefixtures("policy")
def test_a_header_action_changes_exactly_that_header(
    postfix: Postfix, expression: str, changes: dict[str, str | None]
) -> None:
    answer = postfix.send(asking(expression), service="policy")
    assert answer.code == 250, f"{answer}\n{postfix.log()}"
    [delivery] = postfix.wait_delivered(1)
    assert delivery.message == asked(expression, changes)


@pytest.mark.parametrize(
    ("expression", "body"),
    [
        ("Accept(ReplaceBody(b'short\\r\\n'))", b"short\n"),
        ("Accept(ReplaceBody(b''))", b""),
        ("Accept(ReplaceBody(b'\\r\\n.\\r\\n\\xff\\r\\n'))", b"\n.\n\xff\n"),
        ("Accept(ReplaceBody(b'0123456789abcde\\r\\n' * 20000))", b"0123456789abcde\n" * 20000),
    ],
)
@pytest.mark.usefixtures("policy")
def test_a_replaced_body_is_delivered_byte_for_byte(
    postfix: Postfix, expression: str, body: bytes
) -> None:
    answer = postfix.send(asking(expression), service="policy")
    assert answer.code == 250, f"{answer}\n{postfix.log()}"
    [delivery] = postfix.wait_delivered(1)
    assert delivery.message == asked(expression, body=body)


@pytest.mark.parametrize(("index", "above"), [(0, True), (1, False)])
@pytest.mark.usefixtures("policy")
def test_an_inserted_header_goes_above_or_below_the_received_field(
    postfix: Postfix, index: int, above: bool
) -> None:
    expression = f"Accept(InsertHeader({index}, 'X-Inserted', 'here'))"
    postfix.send(asking(expression), service="policy")
    [delivery] = postfix.wait_delivered(1)
    assert delivery.message == b"X-Inserted: here\n" + asked(expression)
    assert delivery.raw.startswith(b"X-Inserted: here\nReceived: " if above else b"Received: ")


@pytest.mark.parametrize("form", ["{}", "<{}>"])
@pytest.mark.usefixtures("policy")
def test_envelope_actions_change_sender_and_recipients_and_not_the_message(
    postfix: Postfix, form: str
) -> None:
    actions = [
        ("AddRecipient", "added"),
        ("DeleteRecipient", "deleted"),
        ("ChangeSender", "changed"),
    ]
    calls = [f"{action}('{form.format(f'{who}@example.com')}')" for action, who in actions]
    expression = f"Accept({', '.join(calls)})"
    recipients = ["kept@example.com", "deleted@example.com"]
    answer = postfix.send(asking(expression), recipients=recipients, service="policy")
    assert answer.code == 250, f"{answer}\n{postfix.log()}"
    [delivery] = postfix.wait_delivered(1)
    assert delivery.sender == "changed@example.com"
    assert sorted(delivery.recipients) == ["added@example.com", "kept@example.com"]
    assert delivery.message == asked(expression)


@pytest.mark.usefixtures("policy")
def test_all_actions_together_are_applied_in_one_mail(postfix: Postfix) -> None:
    actions = [
        "AddHeader('X-Added', 'yes')",
        "InsertHeader(0, 'X-Top', 'top')",
        "ChangeHeader('Subject', 1, 'changed')",
        "DeleteHeader('X-Twice', 2)",
        "AddRecipient('added@example.com')",
        "DeleteRecipient('deleted@example.com')",
        "ChangeSender('changed@example.org')",
        "ReplaceBody(b'The new body.\\r\\n')",
    ]
    expression = f"Accept({', '.join(actions)})"
    recipients = ["kept@example.com", "deleted@example.com"]
    answer = postfix.send(asking(expression), recipients=recipients, service="policy")
    assert answer.code == 250, f"{answer}\n{postfix.log()}"
    [delivery] = postfix.wait_delivered(1)
    assert delivery.sender == "changed@example.org"
    assert sorted(delivery.recipients) == ["added@example.com", "kept@example.com"]
    assert delivery.raw.startswith(b"X-Top: top\nReceived: ")
    assert delivery.message == b"X-Top: top\n" + asked(
        expression,
        {"Subject": "Subject: changed", "X_Twice_2": None, "added": "X-Added: yes"},
        body=b"The new body.\n",
    )


@pytest.mark.usefixtures("policy")
def test_a_quarantined_mail_is_accepted_and_held_with_its_changes(postfix: Postfix) -> None:
    expression = "Accept(Quarantine('looks odd'), AddHeader('X-Added', 'yes'))"
    answer = postfix.send(asking(expression), service="policy")
    assert answer.code == 250, f"{answer}\n{postfix.log()}"
    [held] = postfix.wait_held(1)
    assert (held.sender, held.recipients) == (SENDER, (RECIPIENT,))
    assert held.message == asked(expression, {"added": "X-Added: yes"})
    assert postfix.deliveries() == []


@pytest.mark.parametrize(
    ("expression", "code", "text"),
    [
        ("Reject('no, thank you')", 550, "5.7.1 no, thank you"),
        ("Reject('no virus here', code=554, xcode='5.6.0')", 554, "5.6.0 no virus here"),
        ("Reject('100 % sure')", 550, "5.7.1 100 % sure"),
        ("TempFail('not now')", 451, "4.7.1 not now"),
    ],
)
@pytest.mark.usefixtures("policy")
def test_a_refusal_at_eom_reaches_the_client_with_its_text(
    postfix: Postfix, expression: str, code: int, text: str
) -> None:
    answer = postfix.send(asking(expression), service="policy")
    assert (answer.stage, answer.code, answer.text) == ("eom", code, text), postfix.log()
    assert postfix.wait_delivered(0) == []


@pytest.mark.usefixtures("policy")
def test_a_discarded_mail_is_accepted_and_delivered_to_nobody(postfix: Postfix) -> None:
    answer = postfix.send(asking("Discard()"), service="policy")
    assert (answer.stage, answer.code) == ("eom", 250)
    assert postfix.wait_delivered(0) == []
    assert postfix.held() == []


@pytest.mark.parametrize("stage", ["mail", "data", "eoh"])
@pytest.mark.parametrize(
    ("verdict", "code", "text"),
    [("reject", 550, "5.7.1 no, thank you"), ("tempfail", 451, "4.7.1 not now")],
)
@pytest.mark.usefixtures("policy")
def test_a_refusal_before_eom_reaches_the_client_at_its_stage(
    postfix: Postfix, stage: str, verdict: str, code: int, text: str
) -> None:
    sender = f"{stage}.{verdict}@example.org"
    answer = postfix.send(asking("Accept()"), sender=sender, service="policy")
    seen_at = "eom" if stage == "eoh" else stage
    assert (answer.stage, answer.code, answer.text) == (seen_at, code, text), postfix.log()
    assert postfix.wait_delivered(0) == []


@pytest.mark.parametrize("stage", ["mail", "data", "eoh"])
@pytest.mark.usefixtures("policy")
def test_an_accept_before_eom_ends_the_filtering_of_that_mail_only(
    postfix: Postfix, stage: str
) -> None:
    ask = "Reject('eom was asked')"
    with postfix.client("policy") as client:
        first = submit(client, asking(ask), sender=f"{stage}.accept@example.org")
        second = submit(client, asking(ask))
    assert (first.code, second.code) == (250, 550), postfix.log()
    [delivery] = postfix.wait_delivered(1)
    assert delivery.message == asked(ask)


@pytest.mark.parametrize("stage", ["mail", "data", "eoh"])
@pytest.mark.usefixtures("policy")
def test_a_discard_before_eom_swallows_that_mail_only(postfix: Postfix, stage: str) -> None:
    with postfix.client("policy") as client:
        first = submit(client, asking("Accept()"), sender=f"{stage}.discard@example.org")
        second = submit(client, asking("Accept()"))
    assert (first.code, second.code) == (250, 250), postfix.log()
    [delivery] = postfix.wait_delivered(1)
    assert delivery.sender == SENDER


@pytest.mark.usefixtures("policy")
def test_a_refused_greeting_refuses_the_mails_after_it(postfix: Postfix) -> None:
    with postfix.client("policy") as client:
        client.ehlo("reject.helo.test")
        answer = submit(client, asking("Accept()"))
    told = (answer.stage, answer.code, answer.text)
    assert told == ("mail", 550, "5.7.1 no, thank you"), postfix.log()


@pytest.mark.usefixtures("policy")
def test_an_unknown_recipient_is_refused_and_the_other_one_gets_the_mail(postfix: Postfix) -> None:
    recipients = ["ghost@example.com", "alice@example.com"]
    answer = postfix.send(asking("None"), recipients=recipients, service="policy")
    assert answer.code == 250, f"{answer}\n{postfix.log()}"
    assert answer.refused == {"ghost@example.com": (550, "5.1.1 no such user: ghost@example.com")}
    [delivery] = postfix.wait_delivered(1)
    assert delivery.recipients == ("alice@example.com",)
    assert delivery.message == asked("None")


@pytest.mark.parametrize(
    "expression", ["1 / 0", "'not a verdict'", "AddHeader('X', 'y')", "AddHeader('X', 'a\\nb: c')"]
)
def test_a_mistake_in_the_milter_is_a_temporary_failure_without_details(
    postfix: Postfix, policy: Daemon, expression: str
) -> None:
    answer = postfix.send(asking(expression), service="policy")
    assert (answer.stage, answer.code) == ("eom", 451), postfix.log()
    assert answer.text.startswith("4.")
    assert not re.search(r"error|traceback|policy\.py|<class|line \d", answer.text, re.I), answer
    assert postfix.wait_delivered(0) == []
    again = postfix.send(asking("None"), service="policy")
    assert again.code == 250, f"{again}\n{policy.log()}"


def test_a_mistake_in_the_milter_is_logged_with_traceback_and_queue_id(
    postfix: Postfix, policy: Daemon
) -> None:
    postfix.send(asking("1 / 0"), service="policy")
    log = policy.wait_log("ZeroDivisionError")
    queue_ids = re.findall(r"cleanup\[\d+\]: (\w+): milter-reject: END-OF-MESSAGE", postfix.log())
    assert len(queue_ids) == 1, postfix.log()
    assert queue_ids[0] in log
