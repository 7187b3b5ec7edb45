"""Is every answer of its own message, whatever happens to the workers?

    python -m bench.chaos [--messages 100000] [--seed TEXT] [--kinds functions plain ...]
        [--troubles kills hups ...] [--sockets unix] [--lie swapped]

Attacks a daemon of its own for each kind of milter, each trouble and each kind of socket, with its
share of the messages, and prints a table. The exit code is 1 where an answer was foreign or
missing, there were more temporary refusals than the trouble excuses, the log has a failure of
ours, the daemon did not end well, or did not come back to the memory, descriptors and processes
that it had. With --lie the answers are mixed on their way: then 1 shows that this is noticed.
"""

from __future__ import annotations

import random
import signal
import sys
from pathlib import Path

from bench.chaos.kinds import KINDS
from bench.chaos.liar import LIES
from bench.chaos.mta import Manner
from bench.chaos.plan import SOCKETS, Outcome, combinations, run
from bench.chaos.troubles import TROUBLES
from bench.report import Report, arguments

MESSAGES = 100_000


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--messages", type=int, default=MESSAGES, help="of all attacks together")
    parser.add_argument("--seed", help="plays the same messages, not the same timing")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=tuple(KINDS))
    parser.add_argument("--troubles", nargs="+", choices=TROUBLES, default=tuple(TROUBLES))
    parser.add_argument("--sockets", nargs="+", choices=SOCKETS, default=SOCKETS)
    parser.add_argument("--lie", choices=LIES, default="", help="how to mix the answers")
    parser.add_argument("--timeout", type=float, default=Manner.timeout, help="s for any packet")
    parser.add_argument("--python", default=sys.executable, help="that runs the daemon")
    parser.add_argument("--show", type=int, default=10, help="failures of an attack, at most")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="logs of attacks that failed")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the daemon too
    seed = options.seed or f"{random.SystemRandom().randrange(1 << 32):08x}"
    plan = combinations(tuple(options.kinds), tuple(options.troubles), tuple(options.sockets))
    report = Report(__doc__)
    report.say(f"seed {seed}, {len(plan)} attacks of {options.messages // len(plan)} messages")
    outcomes = list[Outcome]()
    for combination in plan:
        outcome = run(
            combination, options.messages // len(plan), f"{seed}-{len(outcomes)}",
            manner=Manner(timeout=options.timeout), lie=options.lie, python=options.python,
            keep=options.keep,
        )  # fmt: skip
        outcomes.append(outcome)
        report.say(f"{combination}: {'failed' if outcome.failures else 'in order'}")
        for failure in outcome.failures[: options.show]:
            report.say(f"  {failure}")
    report.table("Attacks", [outcome.row() for outcome in outcomes])
    report.save(options)
    return 1 if any(outcome.failures for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
