"""Messages and faults as FLARE Shareables."""

from __future__ import annotations

from typing import Final

from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.shareable import Shareable, make_reply

from fedgestalt.errors import (
    ConfigError,
    FedgestaltError,
    PeerError,
    PlanError,
    PluginError,
    ServerError,
    SiteError,
)
from fedgestalt.messages import Message

BODY: Final = "fedgestalt"
FAULT: Final = "fedgestalt.fault"
_SAFE_TO_REPORT = (SiteError, PeerError, ServerError, PlanError, PluginError)
FAULT_LIMIT: Final = 500


def to_shareable(message: Message) -> Shareable:
    """Wrap a message."""
    shareable = Shareable()
    shareable[BODY] = message.to_fields()
    return shareable


def body(shareable: Shareable) -> object:
    """The fields of the wrapped message, unchecked."""
    return shareable.get(BODY)


def fault_reply(error: Exception) -> Shareable:
    """A reply that says why a site failed.

    Errors about a site's data or settings may name files: they stay in the site's own log.
    """
    if isinstance(error, _SAFE_TO_REPORT):
        what = str(error)
    elif isinstance(error, ConfigError):
        what = "its settings or the job's options are wrong; its own log says more."
    elif isinstance(error, FedgestaltError):
        what = "its data cannot be used; its own log says more."
    else:
        what = f"unexpected {type(error).__name__}; its own log says more."
    reply = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    reply[FAULT] = what[:FAULT_LIMIT]
    return reply


def fault_of(reply: Shareable) -> str:
    """What a site said went wrong, or an empty string if nothing did."""
    code = reply.get_return_code()
    if code in (None, ReturnCode.OK):
        return ""
    said = reply.get(FAULT)
    return said[:FAULT_LIMIT] if isinstance(said, str) else f"FLARE return code {code}."
