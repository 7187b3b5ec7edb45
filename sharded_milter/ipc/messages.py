"""What master and workers say to each other, and how that becomes bytes: the one codec.

| message    | way    | says                                                                 |
|------------|--------|----------------------------------------------------------------------|
| Ready      | master | the milters are loaded: their manifests, the code's digest           |
| LoadFailed | master | a milter cannot be loaded, and why                                   |
| Sandboxed  | master | before Ready: what became of the sandbox, in a sentence for the log  |
| Ask        | worker | answer this question; its answer is an `Answer`                      |
| Withdraw   | worker | do not begin that question; its answer is an `Answer` that says so   |

All travel in AMP's boxes over one UNIX socket for each worker. A question carries a transcript
and its answer carries reply packets, both in the milter protocol's own bytes. AMP limits a value
to 65,535 bytes, so a part is inline while small and a descriptor of anonymous memory when large.

A `Field` says how one value is written and read. `Schema` writes and reads whole messages with
the fields, which are also the arguments of AMP's commands: there is no second format.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from twisted.protocols import amp

from sharded_milter.ipc.memory import Memory, mapped

# The longest text (a traceback, a name) that is sent as a plain AMP value.
MAX_TEXT = 60_000

_INLINE, _DESCRIPTOR = b"=", b"@"
_LENGTH = 2  # bytes of a length in AMP's boxes


class Descriptors(Protocol):
    """The end of a channel: it passes descriptors on beside the bytes."""

    def _sendFileDescriptor(self, fd: int) -> int: ...
    def _getDescriptor(self, ordinal: int) -> int: ...


def prefixed(data: bytes) -> bytes:
    """A key or a value as AMP's boxes have it: behind its length."""
    return len(data).to_bytes(_LENGTH, "big") + data


class Field(amp.Argument):
    """One value of a message, which is bytes as it is."""

    def pack(self, value: Any, channel: Descriptors) -> bytes:
        """The value as a box has it."""
        return bytes(value)

    def unpack(self, value: bytes, channel: Descriptors) -> Any:
        """What `pack` was given."""
        return value

    def drop(self, value: bytes, channel: Descriptors) -> None:
        """Lets go of what came beside the value, unless `unpack` has taken it."""

    # What AMP calls, for messages that take its own way.

    def toBox(self, name: bytes, strings: Any, objects: Any, proto: Any) -> None:
        value = objects.pop(name.decode(), None)
        if value:
            strings[name] = self.pack(value, proto)

    def fromBox(self, name: bytes, strings: Any, objects: Any, proto: Any) -> None:
        if name in strings:
            objects[name.decode()] = self.unpack(strings.pop(name), proto)


class Head(Field):
    """A question's stage letter, milter, session and start, as a `QuestionHead`."""

    _packing = struct.Struct(">cHQQ")

    def pack(self, value: Any, channel: Descriptors) -> bytes:
        data: bytes = self._packing.pack(*value)
        return data

    def unpack(self, value: bytes, channel: Descriptors) -> tuple[bytes, int, int, int]:
        return self._packing.unpack(value)


class Part(Field):
    """Bytes of any length: `bytes` or `Memory` is sent, `bytes` or a read-only view arrives."""

    def pack(self, value: Any, channel: Descriptors) -> bytes:
        if isinstance(value, Memory):
            ordinal = channel._sendFileDescriptor(value.fd)
            return b"%s%d %d" % (_DESCRIPTOR, ordinal, value.size)
        inline: bytes = value
        return _INLINE + inline

    def unpack(self, value: bytes, channel: Descriptors) -> bytes | memoryview:
        if value.startswith(_INLINE):
            return value[1:]
        ordinal, size = map(int, value[1:].split())
        return mapped(channel._getDescriptor(ordinal), size)

    def drop(self, value: bytes, channel: Descriptors) -> None:
        if value.startswith(_DESCRIPTOR):
            with suppress(KeyError, ValueError):  # it is taken, or was never one
                os.close(channel._getDescriptor(int(value[1:].partition(b" ")[0])))


class Schema:
    """The fields of a message in order. An empty value is left out of the box."""

    def __init__(self, **fields: Field) -> None:
        self._fields = [(name.encode(), field) for name, field in fields.items()]
        self._keyed = [(prefixed(key), field) for key, field in self._fields]

    @property
    def arguments(self) -> list[tuple[bytes, amp.Argument]]:
        """The message as AMP declares it."""
        return list(self._fields)

    def write(
        self, kind: bytes, tag: bytes, values: tuple[Any, ...], channel: Descriptors
    ) -> bytes:
        """The whole box with that tag; `kind` is what a box of its kind begins with.

        Raises amp.TooLong for an inline value that no box can hold.
        """
        pieces = [kind, len(tag).to_bytes(_LENGTH, "big"), tag]
        for (key, field), value in zip(self._keyed, values, strict=True):
            if value:
                data = field.pack(value, channel)
                if len(data) > amp.MAX_VALUE_LENGTH:
                    raise amp.TooLong(False, True, data, key[_LENGTH:])
                pieces += (key, len(data).to_bytes(_LENGTH, "big"), data)
        pieces.append(bytes(_LENGTH))
        return b"".join(pieces)

    def read(self, box: Mapping[bytes, bytes], channel: Descriptors) -> list[Any]:
        """The values of a box in the fields' order; empty bytes where it has none.

        Raises what a malformed value leads to; no descriptor of the box is left open then.
        """
        try:
            return [
                field.unpack(box[key], channel) if key in box else b""
                for key, field in self._fields
            ]
        except Exception:
            self.drop(box, channel)
            raise

    def drop(self, box: Mapping[bytes, bytes], channel: Descriptors) -> None:
        """Closes the descriptors that came with a box which nobody will read."""
        for key, field in self._fields:
            if key in box:
                field.drop(box[key], channel)


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
    verdict, its notes for later stages and its log records.
    """

    replies: bytes = b""
    error: bytes = b""
    withdrawn: bytes = b""
    reason: bytes = b""
    notes: bytes = b""
    records: bytes = b""


WITHDRAWN = Answer(withdrawn=b"1")

QUESTION = Schema(head=Head(), connection=Part(), message=Part(), command=Part())
ANSWER = Schema(
    replies=Part(),
    error=Field(),
    withdrawn=Field(),
    reason=Field(),
    notes=Part(),
    records=Part(),
)


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


_MANIFEST = (b"name", b"negotiation", b"light", b"shard_by", b"pinning")


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


class LoadFailed(amp.Command):
    """Worker to master: a milter cannot be loaded, for this reason."""

    arguments = [(b"reason", amp.String()), (b"details", amp.String())]  # noqa: RUF012
    response = []  # noqa: RUF012


class Sandboxed(amp.Command):
    """Worker to master, before Ready: what became of the sandbox, in a sentence for the log.

    `incomplete` is not empty where it is not as it should be.
    """

    arguments = [(b"text", amp.String()), (b"incomplete", amp.String())]  # noqa: RUF012
    response = []  # noqa: RUF012


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
    return ANSWER.write(_ANSWERS, tag, answer, channel)
