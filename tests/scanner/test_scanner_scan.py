"""Scanning a whole message: each finding once, the severest first."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scanner_samples import EICAR, GTUBE, encrypted, gzipped, mail, stopped, tarred, zipped

from sharded_milter.scanner.limits import ScanLimits
from sharded_milter.scanner.rules import Finding, Rules, Severity
from sharded_milter.scanner.scan import ScanReport, scan

RULES = Rules()
TAG, QUARANTINE, REJECT = Severity.TAG, Severity.QUARANTINE, Severity.REJECT


def report(raw: bytes, limits: ScanLimits | None = None) -> ScanReport:
    return scan(raw, RULES, limits or ScanLimits(), stopped)


def rules(raw: bytes) -> list[str]:
    return [finding.rule for finding in report(raw).findings]


def test_an_ordinary_mail_is_clean() -> None:
    clean = report(mail(("a.txt", b"text"), ("b.zip", zipped(("c", b"text")))))
    assert clean == ScanReport(findings=(), parts=4, milliseconds=0)
    assert (clean.result, clean.severity) == ("clean", None)


@pytest.mark.parametrize(
    ("attachments", "result", "findings"),
    [
        ([("a.zip", encrypted(zipped(("a", b"x"))))], "tagged", [("encrypted_archive", TAG)]),
        ([("a.pdf.exe", b"x")], "quarantined", [("double_extension", QUARANTINE)]),
        ([("a.com", EICAR)], "rejected", [("eicar", REJECT)]),
        (
            [("a.zip", encrypted(zipped(("a.pdf.exe", b"x"))))],
            "quarantined",
            [("double_extension", QUARANTINE), ("encrypted_archive", TAG)],
        ),
        (
            [("a.zip", encrypted(zipped(("a", b"x")))), ("b.pdf.exe", b"x"), ("c", EICAR)],
            "rejected",
            [("eicar", REJECT), ("double_extension", QUARANTINE), ("encrypted_archive", TAG)],
        ),
    ],
)
def test_the_severest_wins_and_comes_first(
    attachments: list[tuple[str, bytes]], result: str, findings: list[tuple[str, Severity]]
) -> None:
    found = report(mail(*attachments))
    assert found.result == result
    assert found.findings == tuple(Finding(rule, severity) for rule, severity in findings)
    assert found.severity is findings[0][1]


def test_a_rule_that_matches_often_is_named_once() -> None:
    assert rules(mail(("a.pdf.exe", b"x"), ("b.pdf.exe", b"x"))) == ["double_extension"]


def test_nothing_is_looked_at_after_a_reject() -> None:
    assert report(mail(("a", EICAR), *[("b.pdf.exe", b"x")] * 50)).parts == 2


@pytest.mark.parametrize(
    "raw",
    [
        EICAR,
        b"Subject: x\r\n\r\n" + EICAR,
        mail(("a.txt", EICAR)),
        mail(("a.zip", zipped(("b", tarred(("c", gzipped(EICAR))))))),
        mail(text=EICAR.decode()),
        b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + EICAR + b"\r\n--b\r\n\r\n--b--",
    ],
    ids=["no header", "body", "attachment", "archives", "text", "preamble"],
)
def test_the_test_virus_is_found_wherever_it_is(raw: bytes) -> None:
    assert rules(raw) == ["eicar"]


@pytest.mark.parametrize(
    "raw",
    [
        GTUBE,
        b"Subject: x\r\n\r\nbuy\r\n" + GTUBE + b"\r\nnow",
        mail(text="ä" + GTUBE.decode()),
        b"Subject: " + GTUBE + b"\r\n\r\n",
    ],
)
def test_the_test_spam_is_found_wherever_it_is(raw: bytes) -> None:
    assert rules(raw) == ["gtube"]


def test_an_archive_bomb_is_a_finding() -> None:
    bomb = zipped(*[(f"{number}", bytes(2_000_000)) for number in range(3)])
    assert rules(mail(("holiday.zip", bomb))) == ["archive_bomb"]


def test_a_message_with_too_many_parts_is_a_finding() -> None:
    raw = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n" + b"--b\r\n\r\n" * 2000
    assert report(raw).findings == (Finding("mime_bomb", QUARANTINE),)
    assert report(raw).parts <= ScanLimits().mime_parts + 1


def test_parts_after_a_bomb_are_still_matched() -> None:
    bomb = ("a.gz", gzipped(bytes(2_000_000)))
    assert rules(mail(bomb, ("b.zip", zipped(("c", EICAR))))) == ["eicar", "archive_bomb"]


def test_a_message_out_of_time_is_a_finding_and_keeps_the_others() -> None:
    now = iter(range(0, 1000, 10))
    raw = mail(("a.pdf.exe", b"x"), *[("b", b"x")] * 50)
    found = scan(raw, RULES, ScanLimits(message_seconds=150), lambda: next(now))
    assert {finding.rule for finding in found.findings} == {"double_extension", "scan_timeout"}
    assert found.parts < 50
    assert found.milliseconds >= 150_000


@given(st.binary(max_size=1000))
def test_any_bytes_have_a_report(raw: bytes) -> None:
    assert report(raw).result in ("clean", "tagged", "quarantined", "rejected")


@given(
    st.integers(0, 1 << 16), st.binary(max_size=8), st.sampled_from([(), (("a.zip", EICAR[:30]),)])
)
def test_any_damage_to_a_mail_has_a_report(
    at: int, damage: bytes, extra: tuple[tuple[str, bytes], ...]
) -> None:
    raw = mail(("a.zip", zipped(("b", b"x" * 50))), ("c.tgz", gzipped(tarred(("d", b"y")))), *extra)
    at %= len(raw)
    assert report(raw[:at] + damage + raw[at + len(damage) :]).parts >= 1
