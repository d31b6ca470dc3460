"""Where each site's job process ran, to notice a startup kit that is in use twice.

FLARE lets the second copy of a kit take over from the first, again and again, and says so in the
server's log alone; each job runs at whichever copy was connected last. A site's job process
therefore says where it runs, as a short digest, and the server compares this with the last job.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Final

PLACES_FILE: Final = "places.json"
_DIGITS = 16
_IS_PLACE = re.compile(rf"[0-9a-f]{{{_DIGITS}}}").fullmatch


def place_of(workspace: str) -> str:
    """A digest of this machine's name and the site's folder; it tells moved from not moved."""
    here = f"{socket.gethostname()}|{Path(workspace).resolve()}"
    return hashlib.sha256(here.encode()).hexdigest()[:_DIGITS]


def is_place(value: object) -> bool:
    """Whether an unchecked value is what :func:`place_of` returns."""
    return isinstance(value, str) and _IS_PLACE(value) is not None


def compare_places(file: Path, places: Mapping[str, str]) -> list[str]:
    """A sentence for every site that has moved since the last job; remembers the new places.

    Args:
        file: the server's memory of places, by site; need not exist.
        places: of this job's sites, as far as they are known.
    """
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    moved = [site for site, place in sorted(places.items()) if known.get(site, place) != place]
    temporary = file.with_suffix(".partial")
    temporary.write_text(json.dumps({**known, **places}), encoding="utf-8")
    temporary.replace(file)
    return [
        f"site {site!r}: it ran on another machine or in another folder than in the last job; if"
        " nobody moved it, its startup kit is in use twice: end one of the two."
        for site in moved
    ]
