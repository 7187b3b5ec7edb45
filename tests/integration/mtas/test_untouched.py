"""A mail that the milter does not change is seen and delivered byte for byte."""

import random

import pytest

from ..mails import stored
from .conftest import Mta, Seen

pytestmark = pytest.mark.integration

HEADER = (
    b"From: sender@example.org\r\n"
    b"Date: Thu, 01 Jan 1970 00:00:00 +0000\r\n"
    b"Message-ID:<1@example.org>\r\n"
    b"Received: from elsewhere\r\n\tby somewhere; Thu, 01 Jan 1970 00:00:00 +0000\r\n"
    b"X-Folded: first\r\n\tsecond\r\n   third\r\n"
    b"X-Begins-With-Fold:\r\n second\r\n"
    b"X-Tab:\tvalue\r\n"
    b"X-Blanks:   three and two at the end  \r\n"
    b"x-CASE:none\r\n"
    b"X-Bytes: caf\xc3\xa9 \x80\x99\xff\r\n"
    b"X-Long: " + b"word " * 180 + b"\r\n"
    b"X-Same: 1\r\nX-Same: 2\r\nx-same: 3\r\n"
)
NOISE = random.Random(3).randbytes(150_000).translate(None, b"\r\n\0")

BODIES = [
    b"",
    b"\r\n",
    b"text\r\n",
    b".\r\n..\r\n.dot\r\nFrom me\r\n\xe9\x80\xff\r\n\r\n",
    b"\r\n".join(NOISE[start : start + 70] for start in range(0, len(NOISE), 70)) + b"\r\n",
]
UNRELATED = b"X-Ask: Accept(AddRecipient('other@example.com'))\r\n"


@pytest.mark.parametrize("body", BODIES, ids=len)
@pytest.mark.parametrize(
    "asked", [b"", b"X-Ask: Accept()\r\n", UNRELATED], ids=["None", "Accept()", "unrelated"]
)
def test_it_is_seen_and_delivered_as_it_was_sent(
    mta: Mta, seen: Seen, body: bytes, asked: bytes
) -> None:
    message = HEADER + b"Subject: bytes\r\n" + asked + b"\r\n" + body
    delivery = mta.deliver(message)
    assert delivery.message == stored(message)
    assert stored(seen.message("bytes")) == delivery.message
    assert seen.message("bytes") == message


def test_with_another_field_added_all_others_are_what_they_were(mta: Mta) -> None:
    asked = b"X-Ask: Accept(AddHeader('X-Added', 'yes'))\r\n"
    message = HEADER + b"Subject: bytes\r\n" + asked + b"\r\n" + BODIES[-1]
    wanted = message.replace(asked, asked + b"X-Added: yes\r\n")
    assert mta.deliver(message).message == stored(wanted)
