"""The start of every job: whether everybody is about to do the same thing.

Each site states facts about itself; the server states those that it knows. Everything that differs,
and every site's refusal, is named in one message, before any image is used.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import fedgestalt
from fedgestalt.errors import ConfigError
from fedgestalt.hooks.registry import Entry, code_digest
from fedgestalt.messages import Message, integer, octets, texts_by_name, word

SERVER: Final = "the server"
MAXIMUM_CLOCK_SKEW_SECONDS: Final = 120
"""More is reported; certificates and schedules go by the clock."""

_REMEDIES: Final[Mapping[str, str]] = {
    "fedgestalt": "install the same version of fedgestalt everywhere",
    "fedgestalt code": "reinstall fedgestalt: its files differ from those elsewhere",
    "nvflare": "install the same version of nvflare everywhere",
    "plugin": "install the same version of this plugin everywhere",
    "label map": "use the consortium's syndrome table and class list at every site;"
    " `fedgestalt cohort check DIR --labels DIR` names the rows that differ from it",
    "classes": "use the consortium's class list at every site",
    "start model": "install the same versions of backbone plugins and weights",
    "weights": "put the same file under this name into every machine's weights folder",
    "number plan": "submit the job anew, so that all sites get the same",
}
_SHOWN, _DIGEST = 12, 64


@dataclass(frozen=True)
class Present(Message):
    """Site to server: what this site would work with.

    Attributes:
        facts: compared with everybody's.
        clock: milliseconds since 1970.
        certificate: the site's, PEM; empty where the job has no use for it.
        cipher: the mask stream that this machine makes fastest; empty likewise.
    """

    schema: ClassVar[str] = "fedgestalt.present/2"
    facts: Mapping[str, str] = texts_by_name()
    clock: int = integer(0, 2**62)
    certificate: bytes = octets(0, 1 << 14)
    cipher: str = word(40)


def present(facts: Mapping[str, str], certificate: bytes = b"", cipher: str = "") -> Present:
    """A site's reply, as of now."""
    return Present(dict(facts), int(time.time() * 1000), certificate, cipher)


def versions(plugins: Iterable[Entry[Any]]) -> dict[str, str]:
    """Facts about the software: versions, and digests of the code that a job will run."""
    facts = {
        "fedgestalt": fedgestalt.__version__,
        "fedgestalt code": code_digest("fedgestalt"),
        "nvflare": importlib.metadata.version("nvflare"),
    }
    for entry in plugins:
        facts[f"plugin {entry.plugin_name}"] = (
            f"{entry.distribution} {entry.version} {entry.digest}"
        )
    return facts


def check_agreement(
    own: Mapping[str, str], stated: Mapping[str, Present], refusals: Mapping[str, str]
) -> None:
    """Compare what everybody stated.

    Args:
        own: the server's facts.
        stated: the sites' facts.
        refusals: what other sites said instead of facts.

    Raises:
        ConfigError: names every difference and refusal, site by site.
    """
    by_party = {SERVER: own} | {site: said.facts for site, said in stated.items()}
    complaints: dict[str, list[str]] = {site: [what] for site, what in refusals.items()}
    for fact in sorted({name for facts in by_party.values() for name in facts}):
        values = {
            party: facts.get(fact, "")
            for party, facts in by_party.items()
            if fact in facts or party != SERVER
        }
        if len(set(values.values())) < 2:
            continue
        usual = own.get(fact) or Counter(values.values()).most_common(1)[0][0]
        others = sorted(party for party, value in values.items() if value == usual)
        remedy = _REMEDIES.get(fact, _REMEDIES.get(fact.partition(" ")[0], ""))
        for party, value in values.items():
            if value != usual:
                complaints.setdefault(party, []).append(
                    f"{fact} is {_short(value)}, with {_names(others)} {_short(usual)} ({remedy})"
                )
    if complaints:
        parts = [f"{party}: {'; '.join(said)}" for party, said in sorted(complaints.items())]
        raise ConfigError(
            f"the job cannot start. {' | '.join(parts)}", remedy="nothing was trained or compared"
        )


def clock_warnings(stated: Mapping[str, Present], received: Mapping[str, float]) -> list[str]:
    """A sentence for every site whose clock is far from the server's."""
    found = []
    for site, said in sorted(stated.items()):
        skew = said.clock / 1000 - received[site]
        if abs(skew) > MAXIMUM_CLOCK_SKEW_SECONDS:
            side = "ahead of" if skew > 0 else "behind"
            found.append(
                f"site {site!r}: its clock is {abs(skew):.0f} seconds {side} the server's;"
                " synchronise it (NTP), certificates go by the clock."
            )
    return found


def _short(value: str) -> str:
    words = value.split() or ["missing"]
    return " ".join(word[:_SHOWN] if len(word) == _DIGEST else word[:80] for word in words)


def _names(parties: list[str]) -> str:
    return ", ".join(parties[:3]) + (" and others" if len(parties) > 3 else "")
