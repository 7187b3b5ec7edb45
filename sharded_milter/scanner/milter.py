"""The content scanner as a milter: the verdict and actions for a report.

A message that is accepted gets one X-Scan-Result field; fields of that name from outside are
deleted.
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

# Characters of all rule names in a header field, a reply or a log line. A line has at most 998
# bytes in RFC 5322, a reply line 512 in SMTP; a name in YARA has at most 128.
MAX_NAMES = 300


def build(rules_dir: str | None) -> Milter:
    """Return the scanner with the bundled rules and those of `rules_dir`, which it compiles now.

    Raise RuleError for a rule that cannot be used, ScannerUnavailable without YARA-X.
    """
    rules = Rules(Path(rules_dir) if rules_dir else None)
    milter = Milter("scanner", sandbox=True)

    @milter.eom
    def scan_message(message: Message) -> Verdict:
        return verdict(scan(bytes(message), rules), len(message.headers.get_all(HEADER)))

    return milter


def verdict(report: ScanReport, forged: int = 0) -> Verdict:
    """Return the verdict on a message with this report and `forged` X-Scan-Result fields."""
    if report.severity is Severity.REJECT:
        names = rule_names(report, Severity.REJECT)
        return Reject(f"message refused by the content scanner: {names}", code=554, xcode="5.7.1")
    # The last field first, because some MTAs count again after each deletion.
    actions: list[Action] = [DeleteHeader(HEADER, index) for index in range(forged, 0, -1)]
    actions.append(InsertHeader(0, HEADER, result(report)))
    if report.severity is Severity.QUARANTINE:
        actions.append(Quarantine(f"content scanner: {rule_names(report, Severity.QUARANTINE)}"))
    return Accept(*actions)


def result(report: ScanReport) -> str:
    """Return the value of X-Scan-Result."""
    names = rule_names(report) or "-"
    return f"{report.result}; rules={names}; parts={report.parts}; ms={report.milliseconds}"


def rule_names(report: ScanReport, least: Severity = Severity.TAG) -> str:
    """Return the names of rules of severity `least` or more, severest first.

    If they have more than MAX_NAMES characters, the rest is given as `+N`.
    """
    names = [finding.rule for finding in report.findings if finding.severity >= least]
    shown = ""
    for number, name in enumerate(names):
        longer = f"{shown},{name}" if shown else name
        if len(longer) > MAX_NAMES:
            return f"{shown},+{len(names) - number}"
        shown = longer
    return shown


milter = build(os.environ.get(RULES_VARIABLE) or None)
