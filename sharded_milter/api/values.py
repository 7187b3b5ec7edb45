"""Frozen values that callbacks get: the client, the envelope, the header, the message.

Everything that SMTP's grammar names (addresses, header fields, macros, HELO) is `str`, decoded
as UTF-8 with surrogateescape, so that any byte can be sent back unchanged; content is `bytes`. A
later stage gets another type, not the same one with an optional field set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar, overload

from sharded_milter.protocol.text import to_wire

if TYPE_CHECKING:
    from email.message import EmailMessage


T = TypeVar("T")


class Lazy(Generic[T]):
    """An iterable that is decoded at its first use, by `decode(*given)`.

    Several threads that use a value for the first time each decode all of it, and replace this
    object with equal results in one step. So no thread waits, and none sees a part of the result.
    """

    __slots__ = ("_decode", "_given")

    def __init__(self, decode: Callable[..., Iterable[T]], *given: object) -> None:
        self._decode = decode
        self._given = given

    def __iter__(self) -> Iterator[T]:
        return iter(self._decode(*self._given))


class Macros(Mapping[str, str]):
    """The MTA's macros by name, in the MTA's spelling: `i`, `{auth_authen}`.

    A name of one character is found with and without braces, as in libmilter's smfi_getsymval.
    """

    __slots__ = ("_source",)

    def __init__(self, pairs: Iterable[tuple[str, str]] = ()) -> None:
        self._source: Lazy[tuple[str, str]] | dict[str, str] = (
            pairs if isinstance(pairs, Lazy) else _by_name(pairs)
        )

    @property
    def _values(self) -> dict[str, str]:
        source = self._source
        if isinstance(source, Lazy):
            source = self._source = _by_name(source)
        return source

    def __getitem__(self, name: str) -> str:
        try:
            return self._values[name]
        except KeyError:
            return self._values[other_spelling(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        return f"Macros({self._values!r})"


def _by_name(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    values: dict[str, str] = {}
    for name, value in pairs:
        values.pop(other_spelling(name), None)  # a later value replaces both spellings
        values[name] = value
    return values


def other_spelling(name: str) -> str:
    """Return `{x}` for `x` and `x` for `{x}`; a longer name is returned unchanged."""
    if len(name) == 1:
        return "{" + name + "}"
    return name[1] if len(name) == 3 and name[0] == "{" and name[2] == "}" else name


@dataclass(frozen=True, slots=True)
class Address:
    """An envelope address.

    `str()` gives the address without angle brackets (`""` for the null sender). `raw` is the
    client's spelling, `esmtp` the ESMTP parameters (`SIZE=100`).
    """

    raw: str
    esmtp: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = self.raw.strip()
        return text[1:-1] if text.startswith("<") and text.endswith(">") else text

    @property
    def local(self) -> str:
        """The part before the last `@`; the whole address if there is none."""
        local, at, domain = str(self).rpartition("@")
        return local if at else domain

    @property
    def domain(self) -> str:
        """The part after the last `@`; `""` if there is none."""
        _, at, domain = str(self).rpartition("@")
        return domain if at else ""


@dataclass(frozen=True, slots=True)
class Header:
    """One header field. `value` is folded with a bare LF and whitespace, as the MTA sent it.

    `space` is the space after the colon, which is not part of the value: `" "` or `""`.
    """

    name: str
    value: str
    space: str = " "

    def __bytes__(self) -> bytes:
        """Return the field in RFC 5322 form, with CRLF at every line end."""
        text = to_wire(f"{self.name}:{self.space}{self.value}")
        return text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") + b"\r\n"


class Headers:
    """The header fields in the order of the message; names are looked up without regard to case.

    `headers["subject"]` is the first value of that name (KeyError if there is none),
    `headers.get("subject")` the same or None, `headers.get_all("received")` all values,
    `headers[0]` the first field of any name.
    """

    # Not derived from Sequence: for type checkers, `in` and `[]` would take no names then.
    __slots__ = ("_source",)

    def __init__(self, fields: Iterable[Header] = ()) -> None:
        self._source: Lazy[Header] | tuple[Header, ...] = (
            fields if isinstance(fields, Lazy) else tuple(fields)
        )

    @property
    def _fields(self) -> tuple[Header, ...]:
        source = self._source
        if isinstance(source, Lazy):
            source = self._source = tuple(source)
        return source

    @overload
    def __getitem__(self, key: str) -> str: ...
    @overload
    def __getitem__(self, key: int) -> Header: ...
    @overload
    def __getitem__(self, key: slice) -> Sequence[Header]: ...
    def __getitem__(self, key: str | int | slice) -> str | Header | Sequence[Header]:
        if not isinstance(key, str):
            return self._fields[key]
        value = self.get(key)
        if value is None:
            raise KeyError(key)
        return value

    def __iter__(self) -> Iterator[Header]:
        return iter(self._fields)

    def __len__(self) -> int:
        return len(self._fields)

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str):
            return self.get(key) is not None
        return key in self._fields

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Headers) and self._fields == other._fields

    def __hash__(self) -> int:
        return hash(self._fields)

    def __repr__(self) -> str:
        return f"Headers({list(self._fields)!r})"

    def get(self, name: str, default: str | None = None) -> str | None:
        """Return the value of the first field of that name, or `default`."""
        return next(iter(self.get_all(name)), default)

    def get_all(self, name: str) -> list[str]:
        """Return the values of all fields of that name, in order."""
        wanted = name.lower()
        return [header.value for header in self._fields if header.name.lower() == wanted]


@dataclass(frozen=True)
class Connection:
    """The client of the MTA.

    `hostname` is its verified name, or its address in brackets. `family` is `"inet"`, `"inet6"`,
    `"unix"` or `"unknown"`; `address` is the IP address or the path, `""` if unknown; `port` is 0
    if unknown. `helo` is the argument of HELO or EHLO, `""` before that.
    """

    hostname: str
    family: str = "unknown"
    address: str = ""
    port: int = 0
    helo: str = ""
    macros: Macros = field(default_factory=Macros, compare=False)


@dataclass(frozen=True)
class Envelope:
    """Sender and recipients. `recipients` are those that were accepted so far."""

    connection: Connection
    sender: Address
    recipients: tuple[Address, ...] = ()
    macros: Macros = field(default_factory=Macros, compare=False)

    @property
    def queue_id(self) -> str:
        """The MTA's queue id (macro `i`); `""` before the MTA has assigned one."""
        return self.macros.get("i", "")


@dataclass(frozen=True)
class Message:
    """A message: envelope, header fields, body. `bytes(message)` is its RFC 5322 form.

    The body is joined from `chunks`, which copies it, at its first use.
    """

    envelope: Envelope
    headers: Headers
    body: bytes

    @classmethod
    def from_chunks(
        cls, envelope: Envelope, headers: Headers, chunks: Iterable[memoryview]
    ) -> Message:
        """Return a message whose body consists of `chunks`, which are not copied."""
        message = object.__new__(cls)
        message.__dict__.update(envelope=envelope, headers=headers, _chunks=tuple(chunks))
        return message

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> bytes:
            """Join the body at its first use."""
            if name != "body" or "_chunks" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            body = self.__dict__["body"] = b"".join(self._chunks)
            return body

    def __reduce__(self) -> tuple[type[Message], tuple[Envelope, Headers, bytes]]:
        return type(self), (self.envelope, self.headers, self.body)

    @property
    def chunks(self) -> tuple[memoryview, ...]:
        """The body in read-only chunks, as the MTA sent them; they are not copied.

        Postfix and Sendmail send 65,535 bytes at a time. For a large message, reading the chunks
        one by one costs the least. A chunk that is kept keeps the whole message in memory.
        """
        chunks: tuple[memoryview, ...] | None = self.__dict__.get("_chunks")
        return (memoryview(self.body),) if chunks is None else chunks

    def __bytes__(self) -> bytes:
        # Cached without cached_property: in Python 3.11 that has one lock for all messages, for
        # which threads would wait.
        kept = self.__dict__
        raw: bytes | None = kept.get("_raw")
        if raw is None:
            raw = kept["_raw"] = b"".join([*map(bytes, self.headers), b"\r\n", *self.chunks])
        return raw

    @property
    def connection(self) -> Connection:
        return self.envelope.connection

    @property
    def sender(self) -> Address:
        return self.envelope.sender

    @property
    def recipients(self) -> tuple[Address, ...]:
        return self.envelope.recipients

    @property
    def macros(self) -> Macros:
        return self.envelope.macros

    @property
    def queue_id(self) -> str:
        return self.envelope.queue_id

    @property
    def size(self) -> int:
        """The length of `bytes(message)` in bytes, computed without joining the message."""
        return sum(map(len, map(bytes, self.headers))) + 2 + sum(map(len, self.chunks))

    def parsed(self) -> EmailMessage:
        """Return the message as an `email.message.EmailMessage`; each call parses it again."""
        # Imported here, because it takes longer than the import of the whole API.
        from email import message_from_bytes, policy

        return message_from_bytes(bytes(self), policy=policy.SMTP)
