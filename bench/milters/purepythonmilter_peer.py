"""purepythonmilter: has the message in hand at its end, then adds one header.

purepythonmilter_peer.py inet:PORT@HOST MS. One event loop, TCP only.
"""

import logging
import sys
import time

import purepythonmilter as ppm

PORT, _, HOST = sys.argv[1].removeprefix("inet:").partition("@")
BURN = float(sys.argv[2]) / 1000

# It knows no message, and its callbacks no connection, so they cannot share what they saw; they
# are here so that it decodes what a scanner would have to see.


async def connect(command: ppm.Connect) -> None:
    pass


async def helo(command: ppm.Helo) -> None:
    pass


async def mail(command: ppm.MailFrom) -> None:
    pass


async def rcpt(command: ppm.RcptTo) -> None:
    pass


async def header(command: ppm.Header) -> None:
    pass


async def body(command: ppm.BodyChunk) -> None:
    pass


async def eom(command: ppm.EndOfMessage) -> ppm.Accept:
    until = time.thread_time() + BURN
    while BURN and time.thread_time() < until:
        sum(range(1000))
    return ppm.Accept(manipulations=[ppm.AppendHeader(headername="X-Bench", headertext="1")])


logging.disable(logging.CRITICAL)
ppm.PurePythonMilter(
    name="bench",
    hook_on_connect=connect,
    hook_on_helo=helo,
    hook_on_mail_from=mail,
    hook_on_rcpt_to=rcpt,
    hook_on_header=header,
    hook_on_body_chunk=body,
    hook_on_end_of_message=eom,
    can_add_headers=True,
).run_server(host=HOST, port=int(PORT))
