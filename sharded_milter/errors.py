"""The error tree, divided by the cause of the error.

MilterError
├── RemoteProtocolError    the MTA has violated the milter protocol
├── LocalProtocolError     a reply of ours, or of a worker, is illegal at its stage
├── BrokenRule             a worker or the master has violated the rules of their channel
├── InvalidValue           an author's value that would break the wire (also a ValueError)
├── InvalidVerdict         a callback's verdict is illegal at its stage (also a TypeError)
├── CallRefused            an author's smfi_ call that is not allowed now (also a RuntimeError)
├── JobFailed              the milter gave no verdict
│   ├── CallbackFailed     the author's code raised; the worker goes on
│   ├── WorkerLost         the worker died while it ran the job
│   ├── DeadlineExceeded   the worker was killed because the job took too long
│   ├── Poisoned           the message has killed workers before and is not scanned again
│   ├── Superseded         the milter was reloaded with other stages while the job waited
│   └── Overloaded         the job never ran: the queue was full or the wait too long
└── StartError             the service cannot start; has an exit code of sysexits(3)
    ├── UsageError         64
    ├── SocketTaken        69
    ├── SystemRefused      71
    ├── NotWritten         74
    ├── NotPermitted       77
    └── ConfigError        78
        └── MilterLoadError  the milter cannot be loaded; may carry the author's traceback
"""

from __future__ import annotations

import os
from typing import ClassVar


class MilterError(Exception):
    """The base of all errors that this package raises on purpose."""


class RemoteProtocolError(MilterError):
    """The MTA has violated the milter protocol; its connection is closed."""


class LocalProtocolError(MilterError):
    """A reply is illegal at its stage or was not negotiated; it is not sent."""


class BrokenRule(MilterError):
    """The process at the other end of a channel has violated a rule; no more is read from it.

    The text is for a log line: the rule, the value and the limit.
    """


class InvalidValue(MilterError, ValueError):
    """A value that cannot be sent on the wire; its constructor raises this."""


class InvalidVerdict(MilterError, TypeError):
    """A callback returned a verdict that is illegal at its stage."""


class CallRefused(MilterError, RuntimeError):
    """A smfi_ call is not allowed now, was not negotiated, or has arguments that cannot be sent.

    libmilter returns MI_FAILURE in these cases. The call has changed nothing.
    """


class JobFailed(MilterError):
    """A job ended without a verdict from the milter; the policy's verdict is sent instead."""


class CallbackFailed(JobFailed):
    """The milter's code raised; the worker has logged the traceback and goes on."""


class WorkerLost(JobFailed):
    """The worker died while it ran the job."""


class DeadlineExceeded(JobFailed):
    """The job was still running at its deadline; its worker was killed."""


class Poisoned(JobFailed):
    """Scans of the message have killed workers before; it is not scanned again."""


class Superseded(JobFailed):
    """The milter was reloaded, and its options differ from those negotiated with the MTA."""


class Overloaded(JobFailed):
    """The job was refused or cancelled before a worker got it."""


class StartError(MilterError):
    """The service cannot start; `str()` is one line for the operator.

    `details` is text to print above the line, such as the traceback of the author's code; may be
    empty.
    """

    exit_code: ClassVar[int] = os.EX_SOFTWARE

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class UsageError(StartError):
    """The command line is wrong (exit code 64)."""

    exit_code = os.EX_USAGE


class SocketTaken(StartError):
    """Another process listens on the socket (exit code 69)."""

    exit_code = os.EX_UNAVAILABLE


class SystemRefused(StartError):
    """The operating system refused something for a reason other than permissions (exit code 71)."""

    exit_code = os.EX_OSERR


class NotWritten(StartError):
    """Results cannot be written to their file (exit code 74)."""

    exit_code = os.EX_IOERR


class NotPermitted(StartError):
    """The operating system denied permission (exit code 77)."""

    exit_code = os.EX_NOPERM


class ConfigError(StartError):
    """The configuration is wrong (exit code 78)."""

    exit_code = os.EX_CONFIG


class MilterLoadError(ConfigError):
    """The milter cannot be loaded (exit code 78)."""
