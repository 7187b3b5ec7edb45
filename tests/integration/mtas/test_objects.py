"""One class with every callback and every smfi_ call, in each place where it can run.

Whether its objects live in a program of the author's own, in the master or in workers: the same
callbacks are called with the same arguments in the same order, and the same bytes are delivered.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Sockets, serving
from ..daemon import Daemon
from ..mails import RECIPIENT, SENDER, write_milter
from ..postfix import submit
from ..sendmail import Sendmail
from .conftest import Mta, mta_of

pytestmark = pytest.mark.integration

PATIENCE = 30.0

EVERYTHING = """
    import asyncio
    import json
    import os
    from pathlib import Path

    from twisted.internet import reactor, task

    from sharded_milter.embedded import Milter, MilterFactory

    CALLS = Path(__file__).with_name("calls")


    class Everything(Milter):
        def __init__(self, factory, protocol):
            super().__init__(factory, protocol)
            self.here = False
            self.subject = ""

        def called(self, *what):
            if self.here:
                with CALLS.open("a") as file:
                    print(json.dumps(what, default=str), file=file)

        def xxfi_negotiate(self, actions, protocol):
            self.called("negotiate", actions, protocol & 0x1FFFFF)
            self.smfi_setsymlist(self.MacroStages.EOM, "{mail_addr} {rcpt_addr}")
            return super().xxfi_negotiate(actions, protocol)

        def xxfi_connect(self, hostname, family, address):
            self.here = True
            self.called("connect", hostname, family, address and address[0])
            return self.ReturnCodes.CONTINUE

        async def xxfi_helo(self, helohost):
            await task.deferLater(reactor, 0.01)
            self.called("helo", helohost)
            return self.ReturnCodes.CONTINUE

        def xxfi_envfrom(self, argv):
            self.called("envfrom", argv, self.smfi_getsymval("{mail_addr}"))
            later = task.deferLater(reactor, 0.01, lambda: self.ReturnCodes.CONTINUE)
            return later

        def xxfi_envrcpt(self, argv):
            self.called("envrcpt", argv, self.smfi_getsymval("{rcpt_addr}"))
            if "ghost" in argv[0]:
                self.smfi_setreply("550", "5.1.1", "no such user, 100% sure")
                return self.ReturnCodes.REJECT
            if "later" in argv[0]:
                self.smfi_setmlreply("451", "4.7.1", "not now", "come again")
                return self.ReturnCodes.TEMPFAIL
            return self.ReturnCodes.CONTINUE

        def xxfi_data(self):
            self.called("data")
            return self.ReturnCodes.CONTINUE

        def xxfi_unknown(self, command):
            self.called("unknown", command.split()[0])
            self.smfi_setreply("502", "5.5.1", "we do not know it either")
            return self.ReturnCodes.REJECT

        async def xxfi_header(self, name, value):
            self.called("header", name, value)
            if name == "Subject":
                self.subject = value
            return self.ReturnCodes.CONTINUE

        def xxfi_eoh(self):
            self.called("eoh")
            return self.ReturnCodes.CONTINUE

        def xxfi_body(self, chunk):
            self.called("body", chunk.decode("latin-1"))
            return self.ReturnCodes.SKIP

        async def xxfi_eom(self):
            self.called("eom", self.smfi_getsymval("{mail_addr}"), bool(self.smfi_getsymval("i")))
            await asyncio.sleep(0) if self.subject == "asyncio" else None
            self.smfi_progress()
            if self.subject == "change":
                self.smfi_addheader("X-Added", "yes")
                self.smfi_insheader(0, "X-Top", "above\\n\\tall")
                self.smfi_chgheader("X-One", 1, "changed")
                self.smfi_chgheader("X-Two", 1, None)
                self.smfi_replacebody(b"another ")
                self.smfi_chgfrom("<changed@example.org>")
                self.smfi_addrcpt("<added@example.com>")
                self.smfi_addrcpt_par("<par@example.com>", "NOTIFY=NEVER")
                self.smfi_delrcpt("<gone@example.com>")
                self.smfi_replacebody(b"body\\r\\n")
            if self.subject == "hold":
                self.smfi_quarantine("for a while")
            if self.subject == "refuse":
                self.smfi_setreply("554", "5.7.1", "not this one")
                return self.ReturnCodes.REJECT
            return self.ReturnCodes.ACCEPT

        def xxfi_abort(self):
            self.called("abort")

        def xxfi_close(self):
            self.called("close")


    class EverythingFactory(MilterFactory):
        milter = Everything
"""

OWN_PROGRAM = """
    import os
    import sys

    from twisted.internet import asyncioreactor

    asyncioreactor.install()

    from twisted.internet import reactor

    from everything import EverythingFactory
    from sharded_milter.embedded import MilterProtocolFactory

    def ready():
        os.write(int(sys.argv[2]), b"\\n")

    reactor.listenUNIX(sys.argv[-1], MilterProtocolFactory(EverythingFactory()), mode=0o666)
    reactor.callWhenRunning(ready)
    reactor.run()
"""

PLACES = {
    "workers": ["./everything.py:EverythingFactory"],
    "master": ["--in-master", "./everything.py:Everything"],
    "own": [],
}


@pytest.fixture(scope="module", params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory,
          sockets: Sockets) -> Iterator[Path]:  # fmt: skip
    """The class runs in one of the places; the folder in which it writes what was called."""
    folder = tmp_path_factory.mktemp(request.param)
    write_milter(folder, "everything.py", EVERYTHING)
    write_milter(folder, "own.py", OWN_PROGRAM)
    if request.param == "own":
        path = sockets.objects.removeprefix("unix:")
        with Daemon(path, cwd=folder, program=[str(folder / "own.py")]):
            yield folder
        return
    with serving(*PLACES[request.param], listen=sockets.objects, cwd=folder):
        yield folder


@pytest.fixture(scope="module")
def sendmail_with_objects(common_ground: Path, sockets: Sockets) -> Iterator[Sendmail]:
    with Sendmail(common_ground / "sendmail-with-objects", milter=sockets.objects) as instance:
        yield instance


@pytest.fixture(scope="module", params=["running_postfix", "sendmail_with_objects"])
def running_mta(request: pytest.FixtureRequest) -> Mta:
    return mta_of(request.getfixturevalue(request.param), "objects")


@pytest.fixture
def mta(running_mta: Mta, place: Path) -> Mta:
    running_mta.instance.clear()
    (place / "calls").write_text("")
    return running_mta


def calls(place: Path) -> list[list[Any]]:
    """What was called up to close, which comes when the MTA has left too."""
    deadline = time.monotonic() + PATIENCE
    while True:
        made = [json.loads(line) for line in (place / "calls").read_text().splitlines()]
        if made and made[-1] == ["close"]:
            return made
        assert time.monotonic() < deadline, made
        time.sleep(0.01)


def letter(subject: str, body: str = "Hello.\r\n") -> bytes:
    fields = [f"From: {SENDER}", "Date: Thu, 01 Jan 1970 00:00:00 +0000", f"Subject: {subject}",
              "X-One: 1", "X-Two: 2", "Message-Id: <1@example.org>"]  # fmt: skip
    return "\r\n".join([*fields, "", body]).encode()


HEADERS = [
    ["header", "From", SENDER],
    ["header", "Date", "Thu, 01 Jan 1970 00:00:00 +0000"],
    ["header", "Subject", "change"],
    ["header", "X-One", "1"],
    ["header", "X-Two", "2"],
    ["header", "Message-Id", "<1@example.org>"],
]


def test_every_callback_is_called_once_in_order_and_every_change_is_made(
    mta: Mta, place: Path
) -> None:
    with mta.client() as client:
        client.ehlo("client.example.org")
        client.docmd("XYZZY")
        recipients = [RECIPIENT, "gone@example.com", "ghost@example.com", "later@example.com"]
        answer = submit(client, letter("change"), recipients=recipients)
    assert answer.code == 250, mta.log()
    deliveries = mta.wait_delivered(1)
    message = deliveries[0].message
    assert deliveries[0].sender == "changed@example.org"
    assert {r for d in deliveries for r in d.recipients} == {
        RECIPIENT, "added@example.com", "par@example.com",
    }  # fmt: skip
    assert deliveries[0].raw.startswith(b"X-Top: above\n\tall\n")
    assert b"X-One: changed\n" in message
    assert b"X-Two" not in message
    assert b"X-Added: yes\n" in message
    assert message.endswith(b"\n\nanother body\n")
    refused = {address: code for address, (code, _) in answer.refused.items()}
    assert refused == {"ghost@example.com": 550, "later@example.com": 451}
    texts = {address: text for address, (_, text) in answer.refused.items()}
    assert "no such user, 100% sure" in texts["ghost@example.com"]
    assert "come again" in texts["later@example.com"]

    made = calls(place)
    assert [call[0] for call in made] == [
        "connect", "helo", "unknown", "envfrom", *["envrcpt"] * 4, "data", *["header"] * 6, "eoh",
        "body", "eom", "close",
    ]  # fmt: skip
    by_name = {call[0]: call for call in made}
    assert by_name["helo"] == ["helo", "client.example.org"]
    assert by_name["envfrom"][1][0] == f"<{SENDER}>"
    assert by_name["envfrom"][2] == SENDER
    assert [call for call in made if call[0] == "header"] == HEADERS
    assert by_name["body"] == ["body", "Hello.\r\n"]
    assert by_name["eom"] == ["eom", SENDER, True]
    assert by_name["unknown"] == ["unknown", "XYZZY"]


def test_a_message_that_the_client_drops_is_aborted(mta: Mta, place: Path) -> None:
    with mta.client() as client:
        client.ehlo("client.example.org")
        client.mail(SENDER)
        client.rcpt(RECIPIENT)
        client.rset()
        answer = submit(client, letter("plain"))
    assert answer.code == 250, mta.log()
    names = [call[0] for call in calls(place)]
    assert names.count("abort") == 1
    assert names.index("abort") < names.index("data")
    assert names[-2:] == ["eom", "close"]


def test_a_verdict_of_its_own_ends_the_message_without_abort(mta: Mta, place: Path) -> None:
    with mta.client() as client:
        client.ehlo("client.example.org")
        answer = submit(client, letter("refuse"))
    assert answer.code == 554
    assert "not this one" in answer.text
    assert "abort" not in [call[0] for call in calls(place)]


def test_a_mail_can_be_held(mta: Mta, place: Path) -> None:
    with mta.client() as client:
        client.ehlo("client.example.org")
        assert submit(client, letter("hold")).code == 250
    assert len(mta.wait_held(1)) == 1


def test_after_skip_no_more_of_the_body_comes(mta: Mta, place: Path) -> None:
    with mta.client() as client:
        client.ehlo("client.example.org")
        assert submit(client, letter("asyncio", body="x" * 70 + "\r\n" * 100_000)).code == 250
    (body,) = [call for call in calls(place) if call[0] == "body"]
    assert len(body[1]) == 65_535


def test_one_object_sees_all_messages_of_its_connection(mta: Mta, place: Path) -> None:
    with mta.client() as client:
        client.ehlo("client.example.org")
        for _ in range(3):
            assert submit(client, letter("plain")).code == 250
    names = [call[0] for call in calls(place)]
    assert (names.count("connect"), names.count("eom"), names.count("close")) == (1, 3, 1)
