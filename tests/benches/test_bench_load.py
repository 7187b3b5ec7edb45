"""The load client speaks the protocol as it was negotiated, and counts each answer once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench import load
from bench.messages import BODY_BYTES, envelope, exchanges, message
from bench.server import ADDS_A_HEADER, serving
from sharded_milter.protocol import commands
from sharded_milter.protocol.replies import Accept, Reject
from sharded_milter.protocol.stages import NO_PROTOCOL, Protocol

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


@pytest.mark.parametrize("glued", [True, False])
@pytest.mark.parametrize("protocol", NEGOTIATED.values(), ids=NEGOTIATED)
def test_what_is_said_is_legal_and_negotiated(
    scripted: Start, protocol: Protocol, glued: bool
) -> None:
    milter = scripted(protocol)
    result = load.run(milter.path, 1, 3, glued=glued)
    assert result.verdicts == {"a": 3}
    assert milter.letters.count("E") == 3
    assert ("L" in milter.letters) is not bool(protocol & Protocol.NO_HEADER)


def test_postfix_begins_each_message_with_abort_and_sendmail_does_not(scripted: Start) -> None:
    postfix, sendmail = scripted(NOTHING_EARLY), scripted(NOTHING_EARLY)
    load.run(postfix.path, 1, 2)
    load.run(sendmail.path, 1, 2, glued=False)
    assert (postfix.letters.count("A"), sendmail.letters.count("A")) == (2, 0)


@pytest.mark.parametrize(
    "verdict", [(VERDICT,), (VERDICT[:9], VERDICT[9:]), [bytes((b,)) for b in VERDICT]]
)
def test_an_answer_counts_once_whatever_pieces_it_comes_in(
    scripted: Start, verdict: list[bytes]
) -> None:
    milter = scripted(NOTHING_EARLY, verdict=verdict)
    result = load.run(milter.path, 1, 5)
    assert (result.messages, result.verdicts) == (5, {"a": 5})


def test_several_connections_send_their_share(scripted: Start) -> None:
    milter = scripted(NO_PROTOCOL)
    assert load.run(milter.path, 3, 4).messages == 12
    assert milter.letters.count("O") == 3


def test_two_answers_are_an_error(scripted: Start) -> None:
    milter = scripted(NOTHING_EARLY, verdict=[Accept().encode() + Reject().encode()])
    with pytest.raises(ConnectionError, match="2 answers"):
        load.run(milter.path, 1, 1)


def test_a_run_for_no_time_sends_one_message_on_each_connection(scripted: Start) -> None:
    assert load.run_for(scripted(NO_PROTOCOL).path, 1, 0.0).messages == 1


def test_an_envelope_alone_ends_with_its_last_recipient(scripted: Start) -> None:
    milter = scripted(NO_PROTOCOL)
    result = load.run(milter.path, 1, 2, packets=envelope(3))
    assert (result.verdicts, milter.letters.count("R")) == ({"c": 2}, 6)


def test_groups_end_with_what_is_answered() -> None:
    groups, rest = exchanges(message(), Protocol.NR_HEADER | Protocol.NO_BODY)
    assert [chr(group[-1][4]) for group in groups] == ["M", "R", "T", "N", "E"]
    assert rest == []
    alone, rest = exchanges(envelope(), NOTHING_EARLY)
    assert (alone, len(rest)) == ([], 4)


def test_every_run_sends_the_same_bytes_but_for_the_queue_id() -> None:
    assert message() == message()
    assert message() != message(connection=1)
    body = b"".join(p.chunk for p in message() if isinstance(p, commands.Body))
    assert len(body) == BODY_BYTES


def test_pooled_runs_are_one() -> None:
    one = load.Result(1.0, [0.1, 0.2], {"a": 2}, 0.5)
    two = load.Result(3.0, [0.3], {"a": 1}, 0.5)
    both = load.pooled([one, two])
    assert (both.messages, both.seconds, both.verdicts) == (3, 4.0, {"a": 3})
    assert (both.rate, both.percentile(0.5), both.client_cpu) == (0.75, 0.2, 1.0)


@pytest.mark.parametrize("tcp", [True, False])
def test_the_real_server_answers(tcp: bool) -> None:
    with serving(ADDS_A_HEADER.format(ms=0), "--workers", "1", tcp=tcp) as server:
        assert load.run(server.path, 2, 2).verdicts == {"a": 4}
        assert load.run(server.path, 1, 1, glued=False).verdicts == {"a": 1}
