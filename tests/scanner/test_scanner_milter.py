"""The scanner's verdicts and actions: a header field, a quarantine or a refusal."""

import subprocess
import sys
from pathlib import Path

import pytest
from scanner_samples import EICAR, GTUBE, zipped

from sharded_milter import (
    Accept,
    Address,
    Connection,
    DeleteHeader,
    Envelope,
    Header,
    Headers,
    InsertHeader,
    Message,
    Milter,
    Quarantine,
    Reject,
    Verdict,
)
from sharded_milter.scanner import milter as module
from sharded_milter.scanner.milter import build, result, verdict
from sharded_milter.scanner.rules import Finding, RuleError, Severity
from sharded_milter.scanner.scan import ScanReport

ENVELOPE = Envelope(Connection("client.example"), Address("<a@example.org>"))


def answer(milter: Milter, body: bytes, *fields: tuple[str, str]) -> Verdict:
    headers = Headers(Header(name, value) for name, value in fields)
    verdict: Verdict = milter.callbacks["eom"].function(Message(ENVELOPE, headers, body))
    return verdict


def without_time(accept: Verdict) -> list[object]:
    """Return the actions, without the milliseconds of X-Scan-Result."""
    assert isinstance(accept, Accept)
    return [
        InsertHeader(each.index, each.name, each.value.partition(" ms=")[0])
        if isinstance(each, InsertHeader)
        else each
        for each in accept.actions
    ]


def scan_result(value: str) -> InsertHeader:
    return InsertHeader(0, "X-Scan-Result", value)


def test_a_clean_mail_gets_the_field_at_the_top() -> None:
    accept = answer(module.milter, b"hello\r\n", ("Subject", "x"))
    assert without_time(accept) == [scan_result("clean; rules=-; parts=1;")]


def test_forged_fields_are_deleted_last_first_before_ours_is_inserted() -> None:
    forged = [("X-Scan-Result", "clean"), ("Subject", "x"), ("x-scan-RESULT", "clean")]
    assert without_time(answer(module.milter, b"hello", *forged)) == [
        DeleteHeader("X-Scan-Result", 2),
        DeleteHeader("X-Scan-Result", 1),
        scan_result("clean; rules=-; parts=1;"),
    ]


def test_a_tagged_mail_goes_on_with_the_names() -> None:
    broken = ("Content-Type", "application/zip")
    accept = answer(module.milter, zipped(("a", b"x"))[:-22], broken)
    assert without_time(accept) == [scan_result("tagged; rules=archive_broken; parts=2;")]


def test_a_quarantined_mail_is_held_with_the_names_as_reason() -> None:
    accept = answer(module.milter, b"x", ("Content-Disposition", "x; filename=a.pdf.exe"))
    assert without_time(accept) == [
        scan_result("quarantined; rules=double_extension; parts=1;"),
        Quarantine("content scanner: double_extension"),
    ]


@pytest.mark.parametrize(("body", "rule"), [(EICAR, "eicar"), (GTUBE, "gtube")])
def test_the_test_strings_are_refused_with_the_name_of_the_rule(body: bytes, rule: str) -> None:
    text = f"message refused by the content scanner: {rule}"
    assert answer(module.milter, body) == Reject(text, code=554, xcode="5.7.1")


def test_a_reply_names_only_the_rules_that_refuse() -> None:
    findings = (Finding("r", Severity.REJECT), Finding("q", Severity.QUARANTINE))
    refused = verdict(ScanReport(findings, parts=1, milliseconds=1))
    assert isinstance(refused, Reject)
    assert refused.text.endswith(": r")


@pytest.mark.parametrize("severity", list(Severity))
@pytest.mark.parametrize("length", [1, 20, 128])
def test_many_rules_fit_one_line_and_the_rest_is_counted(severity: Severity, length: int) -> None:
    findings = tuple(Finding(f"{n:0{length}}", severity) for n in range(10**3, 10**3 + 500))
    report = ScanReport(findings, parts=10**6, milliseconds=10**9)
    value = result(report)
    assert len(f"X-Scan-Result: {value}".encode()) < 998
    shown, _, rest = value.partition("rules=")[2].partition(";")[0].rpartition(",+")
    assert len(shown.split(",")) + int(rest) == 500
    refused = verdict(report)
    if isinstance(refused, Reject):
        assert len(refused.text) < 480


def test_rules_of_the_operators_are_compiled_when_it_is_built(tmp_path: Path) -> None:
    rule = 'rule cheese { meta: action = "reject" strings: $a = "cheese" condition: $a }'
    (tmp_path / "food.yar").write_text(rule)
    refused = answer(build(str(tmp_path)), b"cheese")
    assert refused == Reject("message refused by the content scanner: cheese", 554, "5.7.1")
    with pytest.raises(RuleError):
        build(str(tmp_path / "missing"))


def test_the_variable_names_the_folder_of_the_module_milter(tmp_path: Path) -> None:
    (tmp_path / "wrong.yar").write_text("rule {")
    process = subprocess.run(
        [sys.executable, "-c", f"import {module.__name__}"],
        env={module.RULES_VARIABLE: str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode != 0
    assert f"RuleError: {tmp_path}/wrong.yar:1: " in process.stderr
