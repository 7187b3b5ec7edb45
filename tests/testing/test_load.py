"""The load client speaks the protocol as negotiated, and counts each verdict once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from sharded_milter.errors import ConfigError
from sharded_milter.protocol.packets import Packet
from sharded_milter.protocol.replies import Accept, Continue, Reject, ReplyCode, Skip, TempFail
from sharded_milter.protocol.stages import NO_PROTOCOL, Protocol, Stage
from sharded_milter.testing import load
from sharded_milter.testing.dialogue import Mail, envelope, transaction

from .scripted import VERDICT, Scripted

Start = Callable[..., Scripted]

NOTHING_EARLY = (
    Protocol.NR_CONNECT
    | Protocol.NR_HELO
    | Protocol.NR_MAIL
    | Protocol.NR_RCPT
    | Protocol.NR_DATA
    | Protocol.NR_HEADER
    | Protocol.NR_EOH
    | Protocol.NR_BODY
)
NEGOTIATED = {
    "everything is answered": NO_PROTOCOL,
    "only the end is answered": NOTHING_EARLY,
    "the envelope only": Protocol.NO_HEADER | Protocol.NO_EOH | Protocol.NO_BODY,
    "nothing of the connection": Protocol.NO_CONNECT | Protocol.NO_HELO | Protocol.NR_HEADER,
}


@pytest.mark.parametrize("coalesced", [True, False])
@pytest.mark.parametrize("protocol", NEGOTIATED.values(), ids=NEGOTIATED)
def test_what_is_said_is_legal_and_negotiated(
    scripted: Start, protocol: Protocol, coalesced: bool
) -> None:
    milter = scripted(protocol)
    result = load.run(milter.path, 1, 3, coalesced=coalesced)
    assert result.verdicts == {"accept": 3}
    assert milter.letters.count("E") == 3
    assert ("L" in milter.letters) is not bool(protocol & Protocol.NO_HEADER)


def test_postfix_begins_each_message_with_abort_and_sendmail_does_not(scripted: Start) -> None:
    postfix, sendmail = scripted(NOTHING_EARLY), scripted(NOTHING_EARLY)
    load.run(postfix.path, 1, 2)
    load.run(sendmail.path, 1, 2, coalesced=False)
    assert (postfix.letters.count("A"), sendmail.letters.count("A")) == (2, 0)


@pytest.mark.parametrize(
    "verdict", [(VERDICT,), (VERDICT[:9], VERDICT[9:]), [bytes((b,)) for b in VERDICT]]
)
def test_an_answer_counts_once_whatever_pieces_it_comes_in(
    scripted: Start, verdict: list[bytes]
) -> None:
    milter = scripted(NOTHING_EARLY, verdict=verdict)
    result = load.run(milter.path, 1, 5)
    assert (result.messages, result.verdicts) == (5, {"accept": 5})


def test_several_connections_send_their_share(scripted: Start) -> None:
    milter = scripted(NO_PROTOCOL)
    assert load.run(milter.path, 3, 12).messages == 12
    assert milter.letters.count("O") == 3


def test_two_answers_are_an_error(scripted: Start) -> None:
    milter = scripted(NOTHING_EARLY, verdict=[Accept().encode() + Reject().encode()])
    with pytest.raises(ConnectionError, match="the milter sent 2 replies"):
        load.run(milter.path, 1, 1)


def test_a_run_for_no_time_sends_one_message_on_each_connection(scripted: Start) -> None:
    assert load.run_for(scripted(NO_PROTOCOL).path, 1, 0.0).messages == 1


def test_an_envelope_alone_ends_with_its_last_recipient(scripted: Start) -> None:
    milter = scripted(NO_PROTOCOL)
    to_three = envelope(Mail(b"", recipients=["a@b", "c@d", "e@f"]))
    result = load.run(milter.path, 1, 2, content=[to_three])
    assert (result.verdicts, milter.letters.count("R")) == ({"continue": 2}, 6)


LONG = Mail(b"A: b\r\n\r\n" + bytes(200_000), recipients=["a@b", "c@d"])
EARLY: dict[str, tuple[dict[str, list[Packet]], dict[str, int], str]] = {
    "refused at mail": ({"M": [Reject()]}, {"reject": 1}, "M"),
    "accepted at mail": ({"M": [Accept()]}, {"accept": 1}, "M"),
    "in its own words": ({"T": [ReplyCode("451 4.7.1 later")]}, {"tempfail": 1}, "MRRT"),
    "one recipient refused": (
        {"R": [ReplyCode("550 5.1.1 no"), Continue()]}, {"accept": 1}, "MRRTLNBBBBE",
    ),
    "all recipients refused": ({"R": [Reject(), TempFail()]}, {"tempfail": 1}, "MRR"),
    "no more of the body": ({"B": [Skip()]}, {"accept": 1}, "MRRTLNBE"),
    "the rest of the header": ({"L": [Skip()]}, {"accept": 1}, "MRRTLNBBBBE"),
}  # fmt: skip


@pytest.mark.parametrize(("early", "verdicts", "said"), EARLY.values(), ids=EARLY)
def test_answers_before_the_end_are_obeyed(
    scripted: Start, early: dict[str, list[Packet]], verdicts: dict[str, int], said: str
) -> None:
    milter = scripted(NO_PROTOCOL, early=early)
    result = load.run(milter.path, 1, 1, content=[transaction(LONG)])
    assert result.verdicts == verdicts
    assert "".join(milter.letters).replace("D", "").removeprefix("OCHA") == said


def test_a_milter_that_wants_no_mail_of_the_client_is_an_error(scripted: Start) -> None:
    milter = scripted(NO_PROTOCOL, early={"H": [Accept()]})
    with pytest.raises(ConfigError, match="verdict at helo is accept: no message would reach it"):
        load.run(milter.path, 1, 1)


def test_waiting_is_counted_by_stage(scripted: Start) -> None:
    result = load.run(scripted(NOTHING_EARLY & ~Protocol.NR_RCPT).path, 2, 4)
    assert result.waits.keys() == {Stage.RCPT, Stage.EOM}
    assert all(wait > 0 for wait in result.waits.values())


def test_messages_are_sent_in_turn_by_no_more_connections_than_there_are(scripted: Start) -> None:
    milter = scripted(NO_PROTOCOL | Protocol.NO_HEADER | Protocol.NO_BODY)
    content = [transaction(Mail(b"", recipients=["a@b"] * n)) for n in (1, 2)]
    assert load.run(milter.path, 8, 3, content=content).messages == 3
    assert (milter.letters.count("O"), milter.letters.count("R")) == (3, 4)


def test_who_waits_is_told_how_far_it_is(scripted: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "TICK", 0.0)
    heard: list[int] = []
    load.run(scripted(NO_PROTOCOL).path, 1, 3, on_progress=lambda seconds, n: heard.append(n))
    assert (heard[-1], heard) == (3, sorted(heard))


def test_a_milter_that_leaves_is_an_error(scripted: Start) -> None:
    milter = scripted(NOTHING_EARLY, verdict=[])
    milter.hang_up = True
    with pytest.raises(ConnectionError, match="closed the connection"):
        load.run(milter.path, 1, 1)


def test_what_is_never_answered_is_given_up_and_counted(scripted: Start) -> None:
    silent, slow = scripted(NOTHING_EARLY, verdict=[]), scripted(NOTHING_EARLY)
    result = load.run_for(silent.path, 2, 0.0, grace=0.0)
    assert (result.messages, result.unanswered) == (0, 2)
    assert load.run_for(slow.path, 2, 0.0).unanswered == 0


def test_without_a_time_it_is_silence_that_ends_a_run(
    scripted: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "IDLE_TIMEOUT", 0.001)
    result = load.run(scripted(NOTHING_EARLY, verdict=[]).path, 1, 5)
    assert (result.messages, result.unanswered) == (0, 1)


def test_the_rate_is_over_the_time_in_which_there_could_be_answers(scripted: Start) -> None:
    milter = scripted(NOTHING_EARLY, silent_after=3)
    result = load.run(milter.path, 1, 10, seconds=0.05, grace=0.0)
    assert result.messages <= 3
    assert result.seconds >= 0.05


def test_the_block_around_the_traffic_has_no_greeting(scripted: Start) -> None:
    milter = scripted(NO_PROTOCOL)
    seen: list[list[str]] = []

    @contextmanager
    def during() -> Iterator[None]:
        seen.append(list(milter.letters))
        yield
        seen.append(list(milter.letters))

    load.run(milter.path, 1, 2, during=during)
    assert "H" in seen[0]
    assert (seen[0].count("E"), seen[1].count("E")) == (0, 2)


def test_percentiles_and_rate() -> None:
    result = load.Result(4.0, [0.3, 0.1, 0.2], {"accept": 3})
    assert (result.messages, result.rate) == (3, 0.75)
    assert [result.percentile(share) for share in (0.0, 0.5, 0.99, 1.0)] == [0.1, 0.2, 0.3, 0.3]
