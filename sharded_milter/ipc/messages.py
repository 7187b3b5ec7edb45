"""What master and workers say to each other, and how that becomes bytes: the one codec.

| message    | way    | says                                                                 |
|------------|--------|----------------------------------------------------------------------|
| Ready      | master | the milters are loaded: their manifests, the code's digest           |
| LoadFailed | master | a milter cannot be loaded, and why                                   |
| Sandboxed  | master | before Ready: what became of the sandbox, in a sentence for the log  |
| Ask        | worker | answer this question; its answer is an `Answer`                      |
| Withdraw   | worker | do not begin that question; its answer is an `Answer` that says so   |
| Ping       | worker | say that you listen                                                  |

All travel in AMP's boxes over one UNIX socket for each worker. A question carries a transcript
and its answer carries reply packets, both in the milter protocol's own bytes. What an answer may
have is limited here, field by field: the worker keeps to it, and the master does not believe that.
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

# What is said of a verdict or an error in one line of the log; milters' own lines have no more.
MAX_LINE = 8192

# The reply packets of one answer. The new body of a message of --max-message-size's default
# (100 MB), and what the parts of it may have grown by.
MAX_ANSWER = 128 * 1024 * 1024

# Of these packets. A body of MAX_ANSWER has 2,049; the rest are header fields and recipients, of
# which no MTA takes half as many. To check them all takes 30 ms of the master's time.
MAX_PACKETS = 32_768

# The notes and the log records of one answer, each: what is kept beside every message in hand.
MAX_NOTES = 1024 * 1024

_COUNTED_AT_A_TIME = 4096

# The letter of a question by which an object learns that its session is over; no answer counts.
SESSION_END = b"Q"


class QuestionHead(NamedTuple):
    """What a question is about.

    `stage` is the letter of the stage, or SESSION_END. `milter` is the milter's place among those
    that the worker serves. Where the milter is an object, `session` is the object's number and
    the parts of the question are what the object has not been told yet, those of the message
    beginning at `start`; else both are 0 and the parts are all there is.
    """

    stage: bytes
    milter: int = 0
    session: int = 0
    start: int = 0


class Question(NamedTuple):
    """A question as it arrives in a worker: what was memory is a read-only view."""

    head: QuestionHead
    connection: bytes | memoryview
    message: bytes | memoryview
    command: bytes | memoryview  # one that belongs to no transcript (UNKNOWN), for an object


class Answer(NamedTuple):
    """What becomes of a question.

    `replies` are reply packets. `error` is one line that says what the milter's code raised; the
    worker has logged the traceback then. `withdrawn` says that the worker has not begun the
    question, and will not. `reason`, `notes` and `records` are the milter's reason for its
    verdict, its notes for later stages and its log records. `short` says in one line what the
    worker lacks (descriptors, memory) to take the question or to pass its answer on. `lost` says
    what the master has lacked to take the answer, and is never sent.
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

# A worker believes what the master says, so that its questions have no limits here.
_NO_LIMIT = sys.maxsize
QUESTION = Schema(
    head=Head(always=True),
    connection=Part(_NO_LIMIT),
    message=Part(_NO_LIMIT),
    command=Part(_NO_LIMIT),
)
ANSWER = Schema(
    replies=Part(MAX_ANSWER, always=True),  # else a box with nothing in it would be an answer
    error=Field(MAX_LINE),
    withdrawn=Field(1),
    reason=Field(MAX_LINE),
    notes=Part(MAX_NOTES),
    records=Part(MAX_NOTES),
    short=Field(MAX_LINE),
)


def count_packets(replies: bytes) -> Iterator[None]:
    """Counts the packets of an answer, some in each step; raises BrokenRule above MAX_PACKETS.

    What is no packet is for others to find: it ends the count.
    """
    with suppress(RemoteProtocolError):
        for count, _ in enumerate(packets(replies), 1):
            if count > MAX_PACKETS:
                raise BrokenRule(f"replies: more than {MAX_PACKETS} packets")
            if not count % _COUNTED_AT_A_TIME:
                yield


def check_answer(replies: bytes) -> None:
    """Raises BrokenRule for reply packets that are more than an answer may have."""
    if len(replies) > PAYLOAD * MAX_PACKETS:
        ANSWER.check(b"replies", len(replies))
        deque(count_packets(replies), 0)


def _optional(schema: Schema) -> list[tuple[bytes, amp.Argument]]:
    arguments = schema.arguments
    for _, field in arguments:
        field.optional = True
    return arguments


class Ask(amp.Command):
    """Master to worker: answer this question. Its answer comes in its turn.

    Questions are answered in the order in which they were asked, but for those that are withdrawn.
    """

    arguments = _optional(QUESTION)
    response = _optional(ANSWER)


class Withdraw(amp.Command):
    """Master to worker: do not begin the question with this tag, if it has not begun yet."""

    arguments = [(b"tag", Field())]  # noqa: RUF012
    response = []  # noqa: RUF012
    requiresAnswer = False


class Ping(amp.Command):
    """Master to worker: answer this as soon as you read it. There is one at a time."""

    response = []  # noqa: RUF012


_MANIFEST = (b"name", b"negotiation", b"light", b"shard_by", b"affinity")


class Ready(amp.Command):
    """Worker to master: the milters are loaded; these are their manifests, in order.

    `code` is a digest of the files that they were loaded from; workers with equal ones run the
    same code. `socket` is where a pymilter script wants to listen, or empty.
    """

    arguments = [  # noqa: RUF012
        (b"milters", amp.AmpList([(name, amp.String()) for name in _MANIFEST])),
        (b"code", amp.String()),
        (b"socket", amp.String()),
    ]
    response = []  # noqa: RUF012
    requiresAnswer = False


class LoadFailed(amp.Command):
    """Worker to master: a milter cannot be loaded, for this reason."""

    arguments = [(b"reason", amp.String()), (b"details", amp.String())]  # noqa: RUF012
    response = []  # noqa: RUF012
    requiresAnswer = False


class Sandboxed(amp.Command):
    """Worker to master, before Ready: what became of the sandbox, in a sentence for the log.

    `incomplete` is not empty where it is not as it should be.
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
    """The box that asks a question, whose answer bears the tag."""
    return QUESTION.write(_ASKS, tag, (head, connection, message, command), channel)


def read_question(box: Mapping[bytes, bytes], channel: Descriptors) -> Question:
    """What such a box asks."""
    head, *parts = QUESTION.read(box, channel)
    return Question(QuestionHead(*head), *parts)


def drop_question(box: Mapping[bytes, bytes], channel: Descriptors) -> None:
    """Lets go of what came with such a box, which is not read."""
    QUESTION.drop(box, channel)


def answer_box(tag: bytes, answer: tuple[Any, ...], channel: Descriptors) -> bytes:
    """The box that answers the question with the tag; parts of `answer` may be `Memory`."""
    return ANSWER.write(_ANSWERS, tag, answer[: len(ANSWER)], channel)
