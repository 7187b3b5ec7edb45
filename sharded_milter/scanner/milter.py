"""The content scanner as a milter: what a report becomes on the wire.

A mail that goes on carries one X-Scan-Result field, ours: those from outside are deleted.
"""

import os
from pathlib import Path

from sharded_milter import (
    Accept,
    Action,
    DeleteHeader,
    InsertHeader,
    Message,
    Milter,
    Quarantine,
    Reject,
    Verdict,
)

from .rules import Rules, Severity
from .scan import ScanReport, scan

HEADER = "X-Scan-Result"
RULES_VARIABLE = "SHARDED_MILTER_SCANNER_RULES"

# The names of rules in a header field, a reply or a log line. RFC 5322 ends a line at 998 bytes,
# SMTP a reply line at 512; a name of YARA's has 128 at most.
MAX_NAMES = 300


def build(rules_dir: str | None) -> Milter:
    """The scanner with the bundled rules and those of `rules_dir`, compiled now.

    Raises `RuleError` for a rule that cannot be used and `ScannerUnavailable` without YARA-X."""
    rules = Rules(Path(rules_dir) if rules_dir else None)
    milter = Milter("scanner", sandbox=True)

    @milter.eom
    def scan_message(message: Message) -> Verdict:
        return verdict(scan(bytes(message), rules), len(message.headers.get_all(HEADER)))

    return milter


def verdict(report: ScanReport, forged: int = 0) -> Verdict:
    """What the MTA is told about a message with this report and so many forged results."""
    if report.severity is Severity.REJECT:
        names = rule_names(report, Severity.REJECT)
        return Reject(f"message refused by the content scanner: {names}", code=554, xcode="5.7.1")
    # Last first: an MTA that counts what is left finds the same fields as one that counts all.
    actions: list[Action] = [DeleteHeader(HEADER, index) for index in range(forged, 0, -1)]
    actions.append(InsertHeader(0, HEADER, result(report)))
    if report.severity is Severity.QUARANTINE:
        actions.append(Quarantine(f"content scanner: {rule_names(report, Severity.QUARANTINE)}"))
    return Accept(*actions)


def result(report: ScanReport) -> str:
    """The value of X-Scan-Result."""
    names = rule_names(report) or "-"
    return f"{report.result}; rules={names}; parts={report.parts}; ms={report.milliseconds}"


def rule_names(report: ScanReport, least: Severity = Severity.TAG) -> str:
    """The rules that asked for `least` or more, severest first, cut to a line with `+N` more."""
    names = [finding.rule for finding in report.findings if finding.severity >= least]
    shown = ""
    for number, name in enumerate(names):
        longer = f"{shown},{name}" if shown else name
        if len(longer) > MAX_NAMES:
            return f"{shown},+{len(names) - number}"
        shown = longer
    return shown


milter = build(os.environ.get(RULES_VARIABLE) or None)
