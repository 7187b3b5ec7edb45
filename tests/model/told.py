"""A milter that does what the message says: it is what the real workers serve."""

from __future__ import annotations

import os
import re
import time

from sharded_milter import Accept, AddHeader, Message, Milter

ORDERS = re.compile(rb"number=(\d+) sleep=(\d+) then=(\w+)")

milter = Milter("told")


@milter.eom
def scan(message: Message) -> Accept:
    """Sleeps for some milliseconds, then answers, raises or exits."""
    found = ORDERS.search(bytes(message))
    assert found is not None
    number, sleep, then = found.groups()
    with open(os.environ["MODEL_SCANS"], "ab") as file:
        file.write(number + b"\n")
    time.sleep(int(sleep) / 1000)
    if then == b"exits":
        os._exit(3)
    if then == b"raises":
        raise ValueError(f"number={number.decode()}")
    return Accept(AddHeader("X-Number", number.decode()))
