"""Hostile and harmless content, built at run time so that no virus scanner reports the tests."""

import gzip
import io
import tarfile
import zipfile
from collections.abc import Iterable
from email.message import EmailMessage
from email.policy import SMTP

from sharded_milter.scanner.archives import expand
from sharded_milter.scanner.limits import DEFAULTS, Budget, ScanLimits
from sharded_milter.scanner.mime import walk
from sharded_milter.scanner.parts import Mark, Part

EICAR = b"".join(
    [rb"X5O!P%@AP[4\PZX54(P^)7CC)7}$EICAR-", b"STANDARD-ANTIVIRUS-", b"TEST-FILE!$H+H*"]
)
GTUBE = b"".join(
    [b"XJS*C4JDBQADN1.NSBN3*2IDNEN*", b"GTUBE-STANDARD-ANTI-", b"UBE-TEST-EMAIL*C.34X"]
)
OLE = bytes.fromhex("D0CF11E0A1B11AE1")


def windows_program() -> bytes:
    stub = bytearray(b"MZ" + bytes(0x7E))
    stub[0x3C:0x40] = (0x80).to_bytes(4, "little")
    return bytes(stub) + b"PE\0\0" + bytes(64)


def mail(*attachments: tuple[str, bytes], text: str = "Good morning.\r\n") -> bytes:
    message = EmailMessage(policy=SMTP)
    message["Subject"] = "a mail of the tests"
    message.set_content(text)
    for name, data in attachments:
        message.add_attachment(data, maintype="application", subtype="octet-stream", filename=name)
    return message.as_bytes()


def zipped(*members: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as file:
        for name, data in members:
            file.writestr(name, data)
    return out.getvalue()


def encrypted(archive: bytes, *, local: bool = True, central: bool = True) -> bytes:
    """Return the zip with the encryption flag on every member; the content is unchanged."""
    data = bytearray(archive)
    for wanted, signature, flags_at in ((local, b"PK\3\4", 6), (central, b"PK\1\2", 8)):
        at = data.find(signature) if wanted else -1
        while at != -1:
            data[at + flags_at] |= 1
            at = data.find(signature, at + 4)
    return bytes(data)


def tarred(*members: tuple[str, bytes], kinds: Iterable[bytes] = ()) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for kind in kinds:
            info = tarfile.TarInfo("special")
            info.type = kind
            info.linkname = "/etc/passwd"
            file.addfile(info)
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return out.getvalue()


def gzipped(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def stopped() -> float:
    """A clock that does not advance."""
    return 0.0


def leaves(raw: bytes, limits: ScanLimits = DEFAULTS) -> list[Part]:
    return list(walk(raw, Budget(limits, stopped)))


def opened(data: bytes, limits: ScanLimits = DEFAULTS, name: str = "attachment") -> list[Part]:
    return list(expand(Part(name, "", data), Budget(limits, stopped)))


def contents(parts: list[Part]) -> dict[str, bytes]:
    """Return the members by name, without the archives around them."""
    return {part.name: part.data for part in parts if part.depth}


def marks(parts: list[Part]) -> set[Mark]:
    return set().union(*(part.marks for part in parts))
