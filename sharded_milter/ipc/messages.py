"""What master and workers say to each other: AMP commands over one UNIX socket per worker.

A job carries a transcript and its answer carries reply packets, both in the milter protocol's
own bytes. AMP limits a value to 65,535 bytes, so a `Blob` is inline while small and a descriptor
of anonymous memory when large.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from twisted.protocols import amp

# Up to here the bytes go into the AMP box: copying them twice costs less than a descriptor and a
# mapping. AMP's own limit is 65,535.
MAX_INLINE = 48 * 1024

# The longest text (a traceback, a name) that is sent as a plain AMP value.
MAX_TEXT = 60_000

_INLINE, _DESCRIPTOR = b"=", b"@"

_LENGTH = 2  # bytes of a length in AMP's boxes
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class Memory:
    """Anonymous memory that grows at its end and is passed on by descriptor.

    This process's descriptor is closed with the object; the memory is freed when every process
    that got a descriptor has closed it, however it ends.
    """

    __slots__ = ("fd", "size")

    def __init__(self) -> None:
        self.fd = os.memfd_create("sharded-milter", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        self.size = 0

    def append(self, data: bytes | bytearray | memoryview) -> None:
        """Writes all of `data` behind what is there."""
        end = self.size + len(data)
        with memoryview(data) as view:  # which an error must not keep: `data` could not change
            while self.size < end:
                with view[self.size - end :] as rest:
                    self.size += os.write(self.fd, rest)

    def view(self) -> memoryview:
        """What is in it now, read-only."""
        return memoryview(mmap.mmap(self.fd, self.size, prot=mmap.PROT_READ))

    def seal(self) -> None:
        """From now on nobody can change it, and so nobody needs to copy it."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)

    def __del__(self) -> None:
        # Whoever passes it on keeps the object until the other side has answered: a descriptor
        # waits in the socket's queue, and must not be closed or reused meanwhile.
        if hasattr(self, "fd"):
            os.close(self.fd)


def blob(data: bytes) -> bytes | Memory:
    """What to give for a `Blob`: the data itself while small, sealed memory with it when large."""
    if len(data) <= MAX_INLINE:
        return data
    memory = Memory()
    memory.append(data)
    memory.seal()
    return memory


class Blob(amp.Argument):
    """An AMP argument of any length.

    The sender gives what `blob` made, or a `Memory`, and keeps it until the other side has
    answered. The receiver gets bytes, or a read-only view of the memory.
    """

    def toBox(self, name: bytes, strings: Any, objects: Any, proto: Any) -> None:
        value = objects.pop(name.decode(), None)
        if value is not None:
            strings[name] = _to_value(value, proto)

    def fromBox(self, name: bytes, strings: Any, objects: Any, proto: Any) -> None:
        if name in strings:
            objects[name.decode()] = _from_value(strings.pop(name), proto)


def _to_value(part: bytes | Memory, proto: Any) -> bytes:
    return b"".join(_pieces(part, proto)[1:])


def _pieces(part: bytes | Memory, proto: Any) -> tuple[bytes, bytes, bytes]:
    """The length of a `Blob`'s value, its kind, and the rest, not copied before it is joined.

    Sends the descriptor of memory; the rest says where the other side finds it, and its size.
    """
    if isinstance(part, Memory):
        kind, rest = _DESCRIPTOR, b"%d %d" % (proto._sendFileDescriptor(part.fd), part.size)
    else:
        kind, rest = _INLINE, part
    return (len(kind) + len(rest)).to_bytes(_LENGTH, "big"), kind, rest


def _from_value(value: bytes, proto: Any) -> bytes | memoryview:
    if value.startswith(_INLINE):
        return value[1:]
    ordinal, size = map(int, value[1:].split())
    fd = proto._getDescriptor(ordinal)
    try:
        return memoryview(mmap.mmap(fd, size, prot=mmap.PROT_READ))
    finally:
        os.close(fd)


def release(value: bytes | memoryview) -> None:
    """Unmaps a received blob, if nobody keeps a view of it."""
    if isinstance(value, memoryview):
        mapping = value.obj
        value.release()
        with suppress(BufferError):  # the milter keeps a piece: it lives as long as that
            mapping.close()  # type: ignore[attr-defined]  # it is the mmap of fromBox


# The letter of a question that nobody waits for the answer of: the client has left.
FAREWELL = b"Q"


class Question(NamedTuple):
    """What a worker is asked.

    `stage` is the letter of the stage, or FAREWELL. `milter` is the milter's place among those
    that the worker serves. Where the milter is an object, `session` is the object's number, the
    parts are what the object has not been told yet, those of the message beginning at `start`,
    and `command` is one that belongs to no transcript (UNKNOWN); else `session` is 0 and the
    parts are all there is.
    """

    stage: bytes
    connection: bytes | Memory
    message: bytes | Memory
    milter: int = 0
    session: int = 0
    start: int = 0
    command: bytes | Memory = b""

    @property
    def has_memory(self) -> bool:
        """Whether a part of it travels by descriptor."""
        return Memory in (type(self.connection), type(self.message), type(self.command))


class Asked(NamedTuple):
    """A question as it arrives: what was memory is a read-only view."""

    stage: bytes
    milter: int
    session: int
    start: int
    connection: bytes | memoryview
    message: bytes | memoryview
    command: bytes | memoryview = b""


# Stage, milter, session, start.
_HEAD = struct.Struct(">cHQQ")


class Ask(amp.Command):
    """Master to worker: answer this question.

    `head` packs what a `Question` has besides the parts. The answer is reply packets, or, when
    the milter's code raised, one line that says what; the worker has logged the traceback then.

    Both sides make and read the boxes of this command by hand, below: AMP's own way costs more
    than all the rest of a short message.
    """

    arguments = [  # noqa: RUF012
        (b"head", amp.String()),
        (b"connection", Blob()),
        (b"message", Blob()),
        (b"unknown", Blob(optional=True)),  # the command that is no part of the transcript
    ]
    response = [(b"replies", Blob()), (b"error", amp.String(optional=True))]  # noqa: RUF012


def _string(data: bytes) -> bytes:
    """A key or a value as AMP's boxes have it: behind its length."""
    return len(data).to_bytes(_LENGTH, "big") + data


_ASKS = _string(amp.COMMAND) + _string(Ask.commandName)
_TAG = _string(amp.ASK)
_HEAD_KEY = _string(b"head") + _HEAD.size.to_bytes(_LENGTH, "big")
_CONNECTION, _MESSAGE, _UNKNOWN = map(_string, (b"connection", b"message", b"unknown"))
_END = bytes(_LENGTH)


def question_box(question: Question, tag: bytes, proto: Any) -> bytes:
    """The box that asks a question, whose answer bears the tag."""
    head = _HEAD.pack(question.stage, question.milter, question.session, question.start)
    pieces = [_ASKS, _TAG, _string(tag), _HEAD_KEY, head]
    pieces += _CONNECTION, *_pieces(question.connection, proto)
    pieces += _MESSAGE, *_pieces(question.message, proto)
    if question.command:
        pieces += _UNKNOWN, *_pieces(question.command, proto)
    return b"".join([*pieces, _END])


def read_question(box: Mapping[bytes, bytes], proto: Any) -> Asked:
    """What such a box asks."""
    stage, milter, session, start = _HEAD.unpack(box[b"head"])
    parts = [_from_value(box[name], proto) for name in (b"connection", b"message", b"unknown")
             if name in box]  # fmt: skip
    return Asked(stage, milter, session, start, *parts)


def answer_box(replies: bytes | Memory, error: bytes, proto: Any) -> amp.AmpBox:
    """The box that answers a question."""
    box = amp.AmpBox()
    box[b"replies"] = _to_value(replies, proto)
    if error:
        box[b"error"] = error
    return box


def read_answer(box: Mapping[bytes, bytes], proto: Any) -> tuple[bytes, bytes]:
    """Reply packets and error of such a box."""
    value = _from_value(box[b"replies"], proto)
    replies = bytes(value)
    release(value)
    return replies, box.get(b"error", b"")


class Ready(amp.Command):
    """Worker to master: the milters are imported; these are their manifests, in order.

    `socket` is where a pymilter script wants to listen, or empty.
    """

    arguments = [  # noqa: RUF012
        (
            b"milters",
            amp.AmpList(
                [
                    (b"name", amp.String()),
                    (b"negotiation", amp.String()),
                    (b"light", amp.String()),
                    (b"shard_by", amp.String()),
                    (b"pinning", amp.String()),
                ]
            ),
        ),
        (b"socket", amp.String()),
    ]
    response = []  # noqa: RUF012


class LoadFailed(amp.Command):
    """Worker to master: a milter cannot be imported, for this reason."""

    arguments = [(b"reason", amp.String()), (b"details", amp.String())]  # noqa: RUF012
    response = []  # noqa: RUF012
