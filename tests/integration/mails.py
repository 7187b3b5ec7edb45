"""The mails and milters that the tests write."""

import textwrap
import zipfile
from collections.abc import Sequence
from email.message import EmailMessage
from email.policy import SMTP
from io import BytesIO
from pathlib import Path

SENDER = "sender@example.org"
RECIPIENT = "recipient@example.com"

#: Marks every mail with its own subject.
GOOD = """
    from sharded_milter import Accept, AddHeader, Milter

    milter = Milter("good")

    @milter.eom
    def eom(message):
        return Accept(AddHeader("X-Seen", message.headers["Subject"]))
"""


def eicar() -> bytes:
    """The test virus; in pieces, so that no scanner takes offence at this very file."""
    return b"".join(
        [rb"X5O!P%@AP[4\PZX54(P^)7CC)7}$", b"EICAR-STANDARD-", b"ANTIVIRUS-TEST-FILE!", b"$H+H*"]
    )


def zipped(name: str, content: bytes) -> bytes:
    archive = BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(name, content)
    return archive.getvalue()


def mail(
    subject: str = "hello",
    *,
    text: str = "Good morning.\n",
    attachments: Sequence[tuple[str, bytes]] = (),
    fields: Sequence[tuple[str, str]] = (),
) -> bytes:
    """A mail as a client writes it: CRLF, and the same bytes for the same arguments."""
    message = EmailMessage(policy=SMTP)
    message["From"] = SENDER
    message["To"] = RECIPIENT
    message["Subject"] = subject
    for name, value in fields:
        message[name] = value
    message.set_content(text)
    for filename, content in attachments:
        message.add_attachment(
            content, maintype="application", subtype="octet-stream", filename=filename
        )
    if attachments:
        message.set_boundary("a-boundary-of-these-tests")
    return message.as_bytes()


def stored(message: bytes) -> bytes:
    """The mail as a mailbox has it: lines end in LF."""
    return message.replace(b"\r\n", b"\n")


def write_milter(folder: Path, name: str, source: str) -> None:
    """A milter as a file in `folder`; its name on the command line is `./name.py:milter`."""
    (folder / name).write_text(textwrap.dedent(source))
