"""sharded-milter: CPU-heavy Python mail filters on every core. The names for authors of milters.

Importing this package loads no Twisted.
"""

from sharded_milter.api.milter import Milter
from sharded_milter.api.values import (
    Address,
    Connection,
    Envelope,
    Header,
    Headers,
    Macros,
    Message,
)
from sharded_milter.api.verdicts import (
    Accept,
    Action,
    AddHeader,
    AddRecipient,
    ChangeHeader,
    ChangeSender,
    DeleteHeader,
    DeleteRecipient,
    Discard,
    InsertHeader,
    Quarantine,
    Reject,
    ReplaceBody,
    TempFail,
    Verdict,
)
from sharded_milter.errors import InvalidValue, InvalidVerdict, MilterError

__all__ = [
    "Accept",
    "Action",
    "AddHeader",
    "AddRecipient",
    "Address",
    "ChangeHeader",
    "ChangeSender",
    "Connection",
    "DeleteHeader",
    "DeleteRecipient",
    "Discard",
    "Envelope",
    "Header",
    "Headers",
    "InsertHeader",
    "InvalidValue",
    "InvalidVerdict",
    "Macros",
    "Message",
    "Milter",
    "MilterError",
    "Quarantine",
    "Reject",
    "ReplaceBody",
    "TempFail",
    "Verdict",
]

__version__ = "0.2.0"
