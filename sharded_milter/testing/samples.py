"""Sample messages for the bundled content scanner, each with the result that is expected.

The test patterns are joined at run time, because a virus scanner would report a file that
contains them whole.
"""

from __future__ import annotations

import io
import random
import zipfile
from dataclasses import dataclass
from email.message import EmailMessage
from email.policy import SMTP

BIG_ATTACHMENT = 5 * 1024 * 1024


@dataclass(frozen=True)
class Sample:
    """A message and the result that the bundled scanner must give.

    `expected` is `clean`, `tagged`, `quarantined` or `rejected`.
    """

    name: str
    raw: bytes
    expected: str


def eicar() -> bytes:
    """Return the EICAR anti-malware test file."""
    return rb"X5O!P%@AP[4\PZX54(P^)7CC)7}$" + b"EICAR-STANDARD-" + b"ANTIVIRUS-TEST-FILE!$H+H*"


def gtube() -> bytes:
    """Return the GTUBE anti-spam test string."""
    return b"XJS*C4JDBQADN1.NSBN3*2IDNEN*" + b"GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL" + b"*C.34X"


def samples() -> list[Sample]:
    """Return the messages that `sharded-milterctl demo` sends."""
    return [
        Sample("clean text", _mail("Lunch?", "At noon, as always.\n"), "clean"),
        Sample("HTML newsletter", _html(), "clean"),
        Sample("5 MB attachment", _big(), "clean"),
        Sample(
            "EICAR in a zip", _attached("invoice.zip", _zip("invoice.com", eicar())), "rejected"
        ),
        Sample("GTUBE", _mail("You have won", gtube().decode() + "\n"), "rejected"),
        Sample("double extension", _attached("holiday.jpg.exe", b"no program"), "quarantined"),
    ]


def _message(subject: str, text: str) -> EmailMessage:
    message = EmailMessage(policy=SMTP)
    message["From"] = "Alice <alice@example.org>"
    message["To"] = "Bob <bob@example.com>"
    message["Date"] = "Sun, 22 Nov 2026 12:00:00 +0000"
    message["Message-ID"] = f"<{len(subject)}@example.org>"
    message["Subject"] = subject
    message.set_content(text)
    return message


def _mail(subject: str, text: str) -> bytes:
    return bytes(_message(subject, text))


def _html() -> bytes:
    message = _message("This week", "See the other part.\n")
    rows = "".join(f"<tr><td>{n}</td><td>https://example.org/{n}</td></tr>" for n in range(200))
    message.add_alternative(f"<html><body><table>{rows}</table></body></html>", subtype="html")
    return bytes(message)


def _attached(name: str, data: bytes) -> bytes:
    message = _message("Please see attached", "As discussed.\n")
    message.add_attachment(data, maintype="application", subtype="octet-stream", filename=name)
    return bytes(message)


def _big() -> bytes:
    # Seeded, so that every run scans the same bytes.
    return _attached("photos.bin", random.Random(1).randbytes(BIG_ATTACHMENT))


def _zip(name: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return file.getvalue()
