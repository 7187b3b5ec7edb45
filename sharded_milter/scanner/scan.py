"""Scan a message and report: split it, unpack it, match it, and stop at the first reject.

No content of a message raises an exception. A part that could not be scanned is a finding.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .archives import expand
from .limits import DEFAULTS, Budget, OutOfTime, ScanLimits
from .mime import MESSAGE, walk
from .parts import Part
from .rules import Finding, Rules, Severity

_RESULTS = {
    None: "clean",
    Severity.TAG: "tagged",
    Severity.QUARANTINE: "quarantined",
    Severity.REJECT: "rejected",
}


@dataclass(frozen=True, slots=True)
class ScanReport:
    """The findings, severest first, each rule once; the number of parts; the duration."""

    findings: tuple[Finding, ...]
    parts: int
    milliseconds: int

    @property
    def severity(self) -> Severity | None:
        """The severity of the severest finding; None if there is none."""
        return self.findings[0].severity if self.findings else None

    @property
    def result(self) -> str:
        """`clean`, `tagged`, `quarantined` or `rejected`."""
        return _RESULTS[self.severity]


def scan(
    raw: bytes,
    rules: Rules,
    limits: ScanLimits = DEFAULTS,
    clock: Callable[[], float] = time.monotonic,
) -> ScanReport:
    """Match every part of the RFC 5322 message `raw`, down to the members of its archives."""
    started = clock()
    budget = Budget(limits, clock)
    found: dict[str, Severity] = {}
    parts = 0
    try:
        for number, part in enumerate(_all_parts(raw, budget)):
            parts = number
            matched = rules.match(part, budget.part_seconds())
            found.update((finding.rule, finding.severity) for finding in matched)
            if Severity.REJECT in found.values():
                break  # there is no higher severity
            budget.check_time()
    except OutOfTime:
        found.update((finding.rule, finding.severity) for finding in rules.timed_out())
    severest_first = sorted(found.items(), key=lambda item: -item[1])
    return ScanReport(
        findings=tuple(Finding(rule, severity) for rule, severity in severest_first),
        parts=parts,
        milliseconds=round((clock() - started) * 1000),
    )


def _all_parts(raw: bytes, budget: Budget) -> Iterator[Part]:
    """Yield the message as it came, for text outside of all MIME parts; then all its parts."""
    yield Part("", MESSAGE, raw)
    for leaf in walk(raw, budget):
        yield from expand(leaf, budget)
