"""The one error tree, split by who is to blame.

MilterError
├── RemoteProtocolError    the MTA sent bytes that are not the milter protocol
├── LocalProtocolError     a reply of ours, or of a worker, is not legal here
├── BrokenRule             what came over a channel is nothing that its other end may say
├── InvalidValue           an author's value that would break the wire (also a ValueError)
├── InvalidVerdict         a callback returned what its stage cannot say (also a TypeError)
├── CallRefused            an author's smfi_ call that is not allowed now (also a RuntimeError)
├── JobFailed              no verdict came from the milter
│   ├── CallbackFailed     the author's code raised; the worker lives
│   ├── WorkerLost         the worker died with the job
│   ├── DeadlineExceeded   the worker was killed because the job took too long
│   ├── Poisoned           the message has killed workers before and is not scanned again
│   ├── Superseded         the milter was reloaded with other stages while the job waited
│   └── Overloaded         the job never ran: the queue was full or the wait too long
└── StartError             the operator's fault or the system's; has an exit code of sysexits(3)
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
    """Base of every error that this package raises on purpose."""


class RemoteProtocolError(MilterError):
    """The peer's bytes are not the milter protocol; its connection is closed."""


class LocalProtocolError(MilterError):
    """A reply is not legal at this stage or was not negotiated; it is not sent."""


class BrokenRule(MilterError):
    """What came over a channel is nothing that its other end may say, which is not heard further.

    The text is what a log line says of the process at that end: which rule, value and limit.
    """


class InvalidValue(MilterError, ValueError):
    """A value that the wire cannot carry, refused by the constructor that got it."""


class InvalidVerdict(MilterError, TypeError):
    """A callback returned a verdict that its stage cannot give."""


class CallRefused(MilterError, RuntimeError):
    """A smfi_ call is not allowed now, was not negotiated, or has arguments that cannot be sent.

    Where libmilter returns MI_FAILURE; the message has changed nothing.
    """


class JobFailed(MilterError):
    """A job ended without a verdict of the milter; the policy's verdict is sent instead."""


class CallbackFailed(JobFailed):
    """The milter's code raised; the worker has logged the traceback and lives on."""


class WorkerLost(JobFailed):
    """The worker died while it held the job."""


class DeadlineExceeded(JobFailed):
    """The job was still running at its deadline; its worker was killed."""


class Poisoned(JobFailed):
    """The message's scan has killed workers before; it is answered without being scanned."""


class Superseded(JobFailed):
    """The workers serve another version of the milter than the one that the MTA agreed with."""


class Overloaded(JobFailed):
    """The job was refused or taken back before any worker had it."""


class StartError(MilterError):
    """The service cannot start; `str()` is one line for the operator.

    `details` is the traceback of the author's own code, or whatever else belongs above the line;
    empty when the line says it all.
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
    """The operating system refused something that is no matter of rights (exit code 71)."""

    exit_code = os.EX_OSERR


class NotWritten(StartError):
    """What was found out cannot be written where it belongs (exit code 74)."""

    exit_code = os.EX_IOERR


class NotPermitted(StartError):
    """The operating system denied the permission (exit code 77)."""

    exit_code = os.EX_NOPERM


class ConfigError(StartError):
    """The configuration is wrong (exit code 78)."""

    exit_code = os.EX_CONFIG


class MilterLoadError(ConfigError):
    """The milter cannot be loaded (exit code 78)."""
