"""The content scanner and the milter of the front page behind a real Postfix."""

import concurrent.futures
import random
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from .conftest import Sockets, serving
from .daemon import Daemon
from .mails import RECIPIENT, SENDER, eicar, mail, stored, write_milter, zipped
from .postfix import Answer, Delivery, Postfix, submit

pytestmark = pytest.mark.integration

#: The scanner's own field, in the only place where it may be: the first line of the mail.
CLEAN = re.compile(rb"\AX-Scan-Result: clean; rules=[^;\n]*; parts=(?P<parts>\d+); ms=[0-9.]+\n")


def below_the_verdict(delivery: Delivery) -> bytes:
    """The delivered mail without its first line, the scanner's field, and without `Received`."""
    message, count = CLEAN.subn(b"", delivery.message)
    assert count == 1, f"no clean X-Scan-Result as first line:\n{delivery.raw[:500]!r}"
    return message


# The content scanner, which runs when no milter is named


@pytest.fixture(scope="module")
def scanner(
    running_postfix: Postfix, sockets: Sockets, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    """One scanner on both kinds of sockets."""
    folder = tmp_path_factory.mktemp("scanner")
    with serving("--listen", sockets.inet, listen=sockets.scanner, cwd=folder) as daemon:
        yield daemon


both_sockets = pytest.mark.parametrize("service", ["scanner", "inet"])


@both_sockets
@pytest.mark.usefixtures("scanner")
def test_a_clean_mail_is_delivered_with_the_verdict_on_top_and_else_unchanged(
    postfix: Postfix, service: str
) -> None:
    message = mail(text="Guten Tag, schöne Grüße.\n.\n..dots\n")
    answer = postfix.send(message, service=service)
    assert (answer.stage, answer.code) == ("eom", 250), f"{answer}\n{postfix.log()}"
    [delivery] = postfix.wait_delivered(1)
    assert below_the_verdict(delivery) == stored(message)
    assert (delivery.sender, delivery.recipients) == (SENDER, (RECIPIENT,))


@both_sockets
@pytest.mark.usefixtures("scanner")
def test_a_forged_verdict_from_outside_is_gone(postfix: Postfix, service: str) -> None:
    other = ("X-Other", "stays")
    forged = [("X-Scan-Result", "clean; rules=0; parts=0; ms=0"), ("x-scan-RESULT", "trust me")]
    answer = postfix.send(mail(fields=[*forged, other]), service=service)
    assert answer.code == 250, answer
    [delivery] = postfix.wait_delivered(1)
    assert below_the_verdict(delivery) == stored(mail(fields=[other]))


@both_sockets
@pytest.mark.usefixtures("scanner")
def test_the_test_virus_is_refused_with_the_name_of_its_rule(
    postfix: Postfix, service: str
) -> None:
    answer = postfix.send(mail(attachments=[("eicar.com.txt", eicar())]), service=service)
    assert (answer.stage, answer.code) == ("eom", 554), f"{answer}\n{postfix.log()}"
    assert answer.text.startswith("5.7.1 ")
    assert "eicar" in answer.text.lower()
    assert postfix.wait_delivered(0) == []


@pytest.mark.usefixtures("scanner")
def test_the_test_virus_is_found_inside_an_archive(postfix: Postfix) -> None:
    archive = zipped("inner.zip", zipped("harmless.txt", eicar()))
    answer = postfix.send(mail(attachments=[("documents.zip", archive)]), service="scanner")
    assert (answer.stage, answer.code) == ("eom", 554), f"{answer}\n{postfix.log()}"
    assert "eicar" in answer.text.lower()
    assert postfix.wait_delivered(0) == []


@pytest.mark.usefixtures("scanner")
def test_a_program_is_held_for_the_operator_with_the_verdict_on_top(postfix: Postfix) -> None:
    message = mail(attachments=[("invoice.bin", b"\x7fELF" + bytes(100))])
    forged = mail(
        attachments=[("invoice.bin", b"\x7fELF" + bytes(100))], fields=[("X-Scan-Result", "clean")]
    )
    answer = postfix.send(forged, service="scanner")
    assert answer.code == 250, f"{answer}\n{postfix.log()}"
    [held] = postfix.wait_held(1)
    verdict, _, rest = held.message.partition(b"\n")
    assert re.fullmatch(rb"X-Scan-Result: quarantined; rules=executable; .*", verdict), held.raw
    assert rest == stored(message)
    assert postfix.deliveries() == []


@pytest.mark.usefixtures("scanner")
def test_an_attachment_of_ten_megabytes_passes_unharmed(postfix: Postfix) -> None:
    message = mail(attachments=[("noise.bin", random.Random(10).randbytes(10_000_000))])
    begin = time.monotonic()
    answer = postfix.send(message, service="scanner")
    print(f"{len(message)} bytes answered after {time.monotonic() - begin:.2f} s")
    assert answer.code == 250, f"{answer}\n{postfix.log()}"
    [delivery] = postfix.wait_delivered(1)
    assert below_the_verdict(delivery) == stored(message)


@both_sockets
@pytest.mark.usefixtures("scanner")
def test_fifty_mails_on_ten_connections_get_each_their_own_verdict(
    postfix: Postfix, service: str
) -> None:
    infected = {number for number in range(50) if number % 3 == 0}
    contents = [eicar() if number in infected else b"clean %d" % number for number in range(50)]
    messages = [
        mail(f"mail {number}", attachments=[("a.bin", content)])
        for number, content in enumerate(contents)
    ]

    def one_connection(numbers: Sequence[int]) -> dict[int, Answer]:
        with postfix.client(service) as client:
            return {number: submit(client, messages[number]) for number in numbers}

    with concurrent.futures.ThreadPoolExecutor(10) as connections:
        parts = list(connections.map(one_connection, [range(first, 50, 10) for first in range(10)]))
    answers = {number: answer for part in parts for number, answer in part.items()}
    assert {number for number, answer in answers.items() if answer.code == 554} == infected
    assert {number for number, answer in answers.items() if answer.code == 250} == set(
        range(50)
    ) - infected
    deliveries = postfix.wait_delivered(50 - len(infected))
    expected = {stored(messages[number]) for number in range(50) if number not in infected}
    assert {below_the_verdict(delivery) for delivery in deliveries} == expected


OPERATORS_RULES = """
rule our_secret { meta: action = "quarantine" strings: $a = "project bluebird" condition: $a }
rule our_newsletter { meta: action = "tag" strings: $a = "unsubscribe" condition: $a }
rule our_enemy { meta: action = "reject" strings: $a = "attack at dawn" condition: $a }
"""


def test_the_rules_of_the_operator_decide_beside_ours(
    postfix: Postfix, lab: tuple[str, Path]
) -> None:
    listen, folder = lab
    (folder / "ours.yar").write_text(OPERATORS_RULES)
    with serving("--scanner-rules", str(folder), listen=listen, cwd=folder):
        answers = {
            text: postfix.send(mail(text=f"{text}\n"), service="lab")
            for text in ["project bluebird", "unsubscribe", "attack at dawn", "harmless"]
        }
        virus = postfix.send(mail(attachments=[("a", eicar())]), service="lab")
        tagged, clean = sorted(delivery.message for delivery in postfix.wait_delivered(2))[::-1]
        [held] = postfix.held()
    codes = {text: answer.code for text, answer in answers.items()}
    accepted = {"project bluebird": 250, "unsubscribe": 250, "harmless": 250}
    assert codes == {**accepted, "attack at dawn": 554}, postfix.log()
    assert "our_enemy" in answers["attack at dawn"].text
    assert virus.code == 554
    assert clean.startswith(b"X-Scan-Result: clean; ")
    assert tagged.startswith(b"X-Scan-Result: tagged; rules=our_newsletter; ")
    assert held.message.startswith(b"X-Scan-Result: quarantined; rules=our_secret; ")


# The milter of the front page


SCAN = """
    from sharded_milter import (
        Accept, AddHeader, Address, Envelope, Message, Milter, Reject, Verdict,
    )

    class Model:
        def score(self, raw: bytes) -> float:
            return 1.0 if b"buy now" in raw else 0.42

    MODEL = Model()
    milter = Milter("spamguard", macros={"eom": ["i", "{auth_authen}"]})

    def exists(recipient: Address) -> bool:
        return recipient.local != "ghost"

    @milter.rcpt(light=True)
    def known_recipient(recipient: Address, envelope: Envelope) -> Reject | None:
        return None if exists(recipient) else Reject(f"no such user: {recipient}", xcode="5.1.1")

    @milter.eom
    def scan(message: Message) -> Verdict:
        score = MODEL.score(bytes(message))
        if score > .99:
            return Reject("message looks like spam")
        return Accept(AddHeader("X-Spam-Score", f"{score:.2f}"))
"""


def test_the_sample_milter_marks_ham_refuses_spam_and_knows_its_users(
    postfix: Postfix, lab: tuple[str, Path]
) -> None:
    listen, folder = lab
    write_milter(folder, "scan.py", SCAN)
    with serving("./scan.py:milter", listen=listen, cwd=folder):
        ham = postfix.send(mail("ham"), recipients=["ghost@example.com", RECIPIENT], service="lab")
        spam = postfix.send(mail("spam", text="buy now\n"), service="lab")
        [delivery] = postfix.wait_delivered(1)
    assert ham.code == 250, postfix.log()
    assert ham.refused == {"ghost@example.com": (550, "5.1.1 no such user: ghost@example.com")}
    assert (spam.stage, spam.code, spam.text) == ("eom", 550, "5.7.1 message looks like spam")
    head, _, body = stored(mail("ham")).partition(b"\n\n")
    assert delivery.message == head + b"\nX-Spam-Score: 0.42\n\n" + body
    assert delivery.recipients == (RECIPIENT,)
