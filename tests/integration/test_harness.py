"""The private Postfix itself: what the other tests rely on, without any milter of ours."""

from pathlib import Path

import psutil
import pytest

from .postfix import Postfix, require_postfix, submit, without_received

pytestmark = pytest.mark.integration

MESSAGE = (
    b"From: sender@example.org\r\nSubject: plain\r\nX-Fold: a\r\n\tb\r\n"
    b"\r\n.dot first\r\n8-bit \xff\r\n"
)


def test_a_mail_is_delivered_byte_for_byte(postfix: Postfix) -> None:
    answer = postfix.send(
        MESSAGE, recipients=["one@example.com", "two@example.com"], service="unfiltered"
    )
    [delivery] = postfix.wait_delivered(1)
    assert answer.code == 250, answer
    assert delivery.sender == "sender@example.org"
    assert delivery.recipients == ("one@example.com", "two@example.com")
    assert delivery.raw.startswith(b"Received: from client.example.test")
    assert delivery.message == MESSAGE.replace(b"\r\n", b"\n")


def test_the_null_sender_is_delivered_as_the_empty_one(postfix: Postfix) -> None:
    postfix.send(MESSAGE, sender="", service="unfiltered")
    [delivery] = postfix.wait_delivered(1)
    assert delivery.sender == ""


def test_one_connection_carries_several_mails(postfix: Postfix) -> None:
    with postfix.client("unfiltered") as client:
        codes = [
            submit(client, MESSAGE, recipients=[f"r{number}@example.com"]).code
            for number in range(3)
        ]
    deliveries = postfix.wait_delivered(3)
    assert codes == [250, 250, 250]
    assert {delivery.recipients for delivery in deliveries} == {
        (f"r{number}@example.com",) for number in range(3)
    }


def test_a_milter_that_is_not_there_is_a_temporary_failure_and_in_the_log(postfix: Postfix) -> None:
    answer = postfix.send(MESSAGE)
    assert (answer.code, answer.text) == (451, "4.7.1 Service unavailable - try again later")
    assert "connect to Milter service unix:" in postfix.log()
    assert postfix.deliveries() == []


def test_clearing_forgets_mails_and_log(postfix: Postfix) -> None:
    postfix.send(MESSAGE, service="unfiltered")
    postfix.wait_delivered(1)
    postfix.clear()
    assert postfix.deliveries() == []
    assert postfix.log() == ""


def test_a_missing_delivery_fails_with_the_mail_log(postfix: Postfix) -> None:
    postfix.send(MESSAGE, service="unfiltered")
    with pytest.raises(
        pytest.fail.Exception, match=r"1 mails delivered instead of 2[^$]*status=sent"
    ):
        postfix.wait_delivered(2, timeout=2)


def test_mail_on_hold_is_readable(common_ground: Path) -> None:
    require_postfix()
    hold_all = {"smtpd_data_restrictions": "check_client_access static:HOLD"}
    with Postfix(common_ground / "holding", settings=hold_all) as holding:
        answer = holding.send(MESSAGE)
        [held] = holding.wait_held(1)
        master = psutil.Process(holding.master_pid())
        family = [master, *master.children(recursive=True)]
    assert answer.code == 250
    assert (held.sender, held.recipients) == ("sender@example.org", ("recipient@example.com",))
    assert held.message == MESSAGE.replace(b"\r\n", b"\n")
    assert [process for process in family if process.is_running()] == []


def test_only_the_newest_received_field_is_taken_away() -> None:
    ours, rest = (
        b"Received: from a\n\tby b; date\n",
        b"Received: from c\n\tby a\n\nReceived: from body\n",
    )
    assert without_received(b"X-Top: 1\n" + ours + rest) == b"X-Top: 1\n" + rest


def test_a_missing_postfix_skips_here_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    reason = "Debian package postfix is not installed"
    monkeypatch.setattr(f"{require_postfix.__module__}.postfix_is_missing", lambda: reason)
    monkeypatch.delenv("CI", raising=False)
    with pytest.raises(pytest.skip.Exception, match=reason):
        require_postfix()
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=reason):
        require_postfix()
