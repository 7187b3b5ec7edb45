"""The messages between master and workers, and their codec.

| message    | to     | content                                                              |
|------------|--------|----------------------------------------------------------------------|
| Ready      | master | the milters are loaded: their manifests, the code's digest           |
| LoadFailed | master | a milter cannot be loaded, and why                                   |
| Sandboxed  | master | before Ready: the state of the sandbox, as a sentence for the log    |
| Ask        | worker | answer this question; its answer is an `Answer`                      |
| Withdraw   | worker | do not begin that question; an `Answer` confirms it                  |
| Ping       | worker | answer this at once                                                  |

All are AMP boxes on one UNIX socket for each worker. A question has a transcript and its answer has
reply packets, both in the milter protocol's own bytes. The fields of an answer have limits here,
which the worker applies and the master checks again.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from twisted.protocols import amp

from sharded_milter.errors import BrokenRule, RemoteProtocolError
from sharded_milter.ipc.fields import Descriptors, Field, Head, Part, Schema, prefixed
from sharded_milter.ipc.memory import Memory
from sharded_milter.protocol.wire import PAYLOAD, packets

# Bytes of a reason or an error: one line of the log.
MAX_LINE = 8192

# Bytes of the reply packets of one answer: a new body for a message of --max-message-size's default
# (100 MB), with some room to grow.
MAX_ANSWER = 128 * 1024 * 1024

# Reply packets of one answer. A body of MAX_ANSWER has 2,049; the rest are header fields and
# recipients, of which no MTA accepts half as many. To check them all takes the master 30 ms.
MAX_PACKETS = 32_768

# Bytes of the notes and of the log records of one answer, each: they are kept with every message.
MAX_NOTES = 1024 * 1024

# Up to here there cannot be more of them, however small they are.
UNCOUNTED = PAYLOAD * MAX_PACKETS

_COUNTED_AT_A_TIME = 4096

# The letter of the end-of-session notice to an object; its reply is ignored.
SESSION_END = b"Q"


class QuestionHead(NamedTuple):
    """The fixed fields of a question.

    `stage` is the letter of the stage, or SESSION_END. `milter` is the milter's index among those
    that the worker serves. If the milter is an object, `session` is the object's number, and the
    question has only the parts that the object has not received yet, with the message from byte
    `start` on. Otherwise both are 0 and the question has the whole transcript.
    """

    stage: bytes
    milter: int = 0
    session: int = 0
    start: int = 0


class Question(NamedTuple):
    """A question as a worker receives it: memory becomes a read-only view."""

    head: QuestionHead
    connection: bytes | memoryview
    message: bytes | memoryview
    command: bytes | memoryview  # a command that is in no transcript (UNKNOWN), for an object


class Answer(NamedTuple):
    """The answer to a question.

    `replies` are reply packets. `error` is one line with the exception that the milter's code
    raised; the worker has logged the traceback. `withdrawn` is not empty if the worker will not
    begin the question. `reason`, `notes` and `records` are the milter's reason for its verdict,
    its notes for later stages and its log records. `short` is one line that says which resource
    (descriptors, memory) the worker lacked for the question or the answer. `lost` says which
    resource the master lacked for the answer; it is never sent.
    """

    replies: bytes = b""
    error: bytes = b""
    withdrawn: bytes = b""
    reason: bytes = b""
    notes: bytes = b""
    records: bytes = b""
    short: bytes = b""
    lost: bytes = b""


WITHDRAWN = Answer(withdrawn=b"1")

# A worker trusts the master, so questions have no limits here.
_NO_LIMIT = sys.maxsize
QUESTION = Schema(
    head=Head(always=True),
    connection=Part(_NO_LIMIT),
    message=Part(_NO_LIMIT),
    command=Part(_NO_LIMIT),
)
ANSWER = Schema(
    replies=Part(MAX_ANSWER, always=True),  # an empty box is no answer
    error=Field(MAX_LINE),
    withdrawn=Field(1),
    reason=Field(MAX_LINE),
    notes=Part(MAX_NOTES),
    records=Part(MAX_NOTES),
    short=Field(MAX_LINE),
)


def count_packets(replies: bytes) -> Iterator[None]:
    """Count the packets of an answer, some in each step; raise BrokenRule above MAX_PACKETS.

    An invalid packet ends the count; it is reported elsewhere.
    """
    with suppress(RemoteProtocolError):
        for count, _ in enumerate(packets(replies), 1):
            if count > MAX_PACKETS:
                raise BrokenRule(f"replies: more than {MAX_PACKETS} packets")
            if not count % _COUNTED_AT_A_TIME:
                yield


def check_answer(replies: bytes) -> None:
    """Raise BrokenRule for more bytes or packets than an answer may have."""
    if len(replies) > UNCOUNTED:
        ANSWER.check(b"replies", len(replies))
        deque(count_packets(replies), 0)


def _optional(schema: Schema) -> list[tuple[bytes, amp.Argument]]:
    arguments = schema.arguments
    for _, field in arguments:
        field.optional = True
    return arguments


class Ask(amp.Command):
    """Master to worker: answer this question.

    Questions are answered in the order in which they were sent, except withdrawn ones.
    """

    arguments = _optional(QUESTION)
    response = _optional(ANSWER)


class Withdraw(amp.Command):
    """Master to worker: do not begin the question with this tag, if it has not begun yet."""

    arguments = [(b"tag", Field())]  # noqa: RUF012
    response = []  # noqa: RUF012
    requiresAnswer = False


class Ping(amp.Command):
    """Master to worker: answer this as soon as it is read. One is open at a time."""

    response = []  # noqa: RUF012


_MANIFEST = (b"name", b"negotiation", b"light", b"shard_by", b"affinity")


class Ready(amp.Command):
    """Worker to master: the milters are loaded; these are their manifests, in order.

    `code` is a digest of the files that they were loaded from; workers with equal digests run the
    same code. `socket` is the address that a pymilter script asks to listen on, or empty.
    """

    arguments = [  # noqa: RUF012
        (b"milters", amp.AmpList([(name, amp.String()) for name in _MANIFEST])),
        (b"code", amp.String()),
        (b"socket", amp.String()),
    ]
    response = []  # noqa: RUF012
    requiresAnswer = False


class LoadFailed(amp.Command):
    """Worker to master: a milter cannot be loaded; `details` may have a traceback."""

    arguments = [(b"reason", amp.String()), (b"details", amp.String())]  # noqa: RUF012
    response = []  # noqa: RUF012
    requiresAnswer = False


class Sandboxed(amp.Command):
    """Worker to master, before Ready: the state of the sandbox, as a sentence for the log.

    `incomplete` is not empty if a part of the sandbox is missing.
    """

    arguments = [(b"text", amp.String()), (b"incomplete", amp.String())]  # noqa: RUF012
    response = []  # noqa: RUF012
    requiresAnswer = False


_ASKS = prefixed(amp.COMMAND) + prefixed(Ask.commandName) + prefixed(amp.ASK)
_ANSWERS = prefixed(amp.ANSWER)


def question_box(
    tag: bytes,
    head: tuple[bytes, int, int, int],
    connection: bytes | Memory,
    message: bytes | Memory,
    command: bytes | Memory,
    channel: Descriptors,
) -> bytes:
    """Return the box of a question; its answer will have the same tag."""
    return QUESTION.write(_ASKS, tag, (head, connection, message, command), channel)


def read_question(box: Mapping[bytes, bytes], channel: Descriptors) -> Question:
    """Return the question in a box; raise as `Schema.read` does."""
    head, *parts = QUESTION.read(box, channel)
    return Question(QuestionHead(*head), *parts)


def drop_question(box: Mapping[bytes, bytes], channel: Descriptors) -> None:
    """Release the memory that came with the box of a question, which is not read."""
    QUESTION.drop(box, channel)


def answer_box(tag: bytes, answer: tuple[Any, ...], channel: Descriptors) -> bytes:
    """Return the box of an answer to the question with the tag; parts may be `Memory`."""
    return ANSWER.write(_ANSWERS, tag, answer[: len(ANSWER)], channel)
