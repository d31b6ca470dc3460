"""Errors that a person reads: what is wrong, where, and what to do about it.

The class says whose fault it is, so that a caller can decide (drop a peer, stop a job, ask the
user) without reading text. The command line prints ``str(error)`` as one sentence and no traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedgestaltError(Exception):
    """Base of all foreseeable faults.

    Args:
        what: what is wrong, without a full stop.
        where: the file, site, plugin or key concerned; empty if there is none.
        remedy: what the reader can do; empty if there is nothing.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        super().__init__(what, where, remedy)
        self.what, self.where, self.remedy = what.rstrip("."), where, remedy.rstrip(".")

    def __reduce__(self) -> tuple[object, ...]:
        """Pickle without calling ``__init__``: an error of a worker process arrives as it was."""
        return type(self).__new__, (type(self), *self.args), vars(self)

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        advice = f"; {self.remedy}" if self.remedy else ""
        sentence = f"{place}{self.what}{advice}"
        return sentence if sentence.endswith("?") else f"{sentence}."


class DataError(FedgestaltError):
    """The cohort or an image is not usable."""


class ConfigError(FedgestaltError):
    """A job specification, option or site setting is wrong."""


class PluginError(FedgestaltError):
    """A plugin is unknown, broken or ambiguous."""


class PlanError(FedgestaltError):
    """The number plan cannot hold the sum; found before anything is sent."""


class SiteError(FedgestaltError):
    """This site cannot or will not do what the job asks."""


class ServerError(FedgestaltError):
    """The server sent something that the protocol does not allow."""


class PeerError(FedgestaltError):
    """Another site sent something that the protocol does not allow.

    Args:
        what: what is wrong.
        site: the name of the site at fault.
        remedy: what the reader can do.
    """

    def __init__(self, what: str, *, site: str, remedy: str = "") -> None:
        super().__init__(what, where=f"site {site!r}", remedy=remedy)
        self.site = site


class SiteLostError(PeerError):
    """A site that died, fell silent or did not answer in time; others may go on without it."""


class RoundFailedError(ServerError):
    """Too few sites were left to open the sum of a round; it stays closed for ever."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Advice that names the known word nearest to ``name``, or lists all of them."""
    words = sorted(known)
    close = difflib.get_close_matches(name, words, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known: {', '.join(words)}" if words else "none is installed"
