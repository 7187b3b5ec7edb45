"""What the MTA has said so far, as frozen values.

Everything that SMTP's grammar names (addresses, header fields, macros, HELO) is `str`, decoded
as UTF-8 with surrogateescape so that any byte survives the way there and back; content is
`bytes`. A stage that knows more gets another type, not an optional field that is filled in.
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
    """What is decoded when somebody looks at it: an iterable that calls `decode(*given)`.

    Threads that look at a value for the first time each decode all of it, and put what they found,
    which is the same, in its place in one step; so none waits, and none sees a part.
    """

    __slots__ = ("_decode", "_given")

    def __init__(self, decode: Callable[..., Iterable[T]], *given: object) -> None:
        self._decode = decode
        self._given = given

    def __iter__(self) -> Iterator[T]:
        return iter(self._decode(*self._given))


class Macros(Mapping[str, str]):
    """The MTA's macros by name, spelled as the MTA does: `i`, `{auth_authen}`.

    A name of one character is found with and without braces, as libmilter's getsymval does.
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
        values.pop(other_spelling(name), None)  # a later one hides it, however spelled
        values[name] = value
    return values


def other_spelling(name: str) -> str:
    """`{x}` for `x` and `x` for `{x}`; longer names have one spelling only."""
    if len(name) == 1:
        return "{" + name + "}"
    return name[1] if len(name) == 3 and name[0] == "{" and name[2] == "}" else name


@dataclass(frozen=True, slots=True)
class Address:
    """An envelope address.

    `str()` is the bare address without angle brackets (`""` for the null sender), `raw` the
    client's own spelling, `esmtp` the parameters that came with it (`SIZE=100`).
    """

    raw: str
    esmtp: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = self.raw.strip()
        return text[1:-1] if text.startswith("<") and text.endswith(">") else text

    @property
    def local(self) -> str:
        """What stands before the last `@`; the whole where there is none."""
        local, at, domain = str(self).rpartition("@")
        return local if at else domain

    @property
    def domain(self) -> str:
        """What stands behind the last `@`; empty where there is none."""
        _, at, domain = str(self).rpartition("@")
        return domain if at else ""


@dataclass(frozen=True, slots=True)
class Header:
    """One header field. `value` keeps its folding (bare LF and blanks), as the MTA sent it.

    `space` is the blank behind the colon, which is no part of the value: `" "` or `""`.
    """

    name: str
    value: str
    space: str = " "

    def __bytes__(self) -> bytes:
        """The field as RFC 5322 writes it, with CRLF at every line end."""
        text = to_wire(f"{self.name}:{self.space}{self.value}")
        return text.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n") + b"\r\n"


class Headers:
    """The header fields in the order of the message; looking a name up ignores its case.

    `headers["subject"]` is the first such value (KeyError if there is none),
    `headers.get("subject")` the same or None, `headers.get_all("received")` all of them,
    `headers[0]` the first field whatever its name.
    """

    # A Sequence in all but name: to type checkers that would hold fields only, and no names.
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
        """The value of the first field of that name."""
        return next(iter(self.get_all(name)), default)

    def get_all(self, name: str) -> list[str]:
        """The values of all fields of that name, in order."""
        wanted = name.lower()
        return [header.value for header in self._fields if header.name.lower() == wanted]


@dataclass(frozen=True)
class Connection:
    """The client.

    `hostname` is its verified name, or its address in brackets. `family` is `"inet"`, `"inet6"`,
    `"unix"` or `"unknown"`; `address` is the IP address or the path, empty when unknown; `port`
    is 0 when unknown. `helo` is the client's greeting, empty before it.
    """

    hostname: str
    family: str = "unknown"
    address: str = ""
    port: int = 0
    helo: str = ""
    macros: Macros = field(default_factory=Macros, compare=False)


@dataclass(frozen=True)
class Envelope:
    """Who sends to whom. `recipients` are those accepted so far."""

    connection: Connection
    sender: Address
    recipients: tuple[Address, ...] = ()
    macros: Macros = field(default_factory=Macros, compare=False)

    @property
    def queue_id(self) -> str:
        """The MTA's queue id (macro `i`); empty as long as it has none."""
        return self.macros.get("i", "")


@dataclass(frozen=True)
class Message:
    """A whole mail: envelope, header fields, body. `bytes(message)` is the RFC 5322 message.

    The body is joined from `chunks` when it is first looked at, which copies it.
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
            """Join the body, of a message that has none yet."""
            if name != "body" or "_chunks" not in self.__dict__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            body = self.__dict__["body"] = b"".join(self._chunks)
            return body

    def __reduce__(self) -> tuple[type[Message], tuple[Envelope, Headers, bytes]]:
        return type(self), (self.envelope, self.headers, self.body)

    @property
    def chunks(self) -> tuple[memoryview, ...]:
        """The body as the MTA has sent it, in read-only chunks that are not copied.

        Postfix and Sendmail send 65,535 bytes at a time. To look at chunk after chunk costs a large
        message least; a chunk that is kept keeps the whole message in memory.
        """
        chunks: tuple[memoryview, ...] | None = self.__dict__.get("_chunks")
        return (memoryview(self.body),) if chunks is None else chunks

    def __bytes__(self) -> bytes:
        # Kept as cached_property would keep it; but that of Python 3.11 lets threads wait for each
        # other, even those that look at different messages.
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
        """The length of `bytes(message)`, which is not made for it."""
        return sum(map(len, map(bytes, self.headers))) + 2 + sum(map(len, self.chunks))

    def parsed(self) -> EmailMessage:
        """The message as the standard library's EmailMessage, parsed anew at each call."""
        # Here, because importing them takes longer than all the rest of the author's names.
        from email import message_from_bytes, policy

        return message_from_bytes(bytes(self), policy=policy.SMTP)
