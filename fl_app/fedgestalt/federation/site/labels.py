"""Whether a site's label map is the consortium's; which rows differ stays at the site."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.cohort import Cohort, differences, label_map_of, read_label_map
from fedgestalt.errors import DataError, SiteError

FILE_NAME: Final = "label-map-differences.txt"


def check_label_map(cohort: Cohort, agreed: Path, store: Path) -> None:
    """Compare the label map of ``cohort`` with that in ``agreed``, a folder in GMDB layout.

    Rows that differ are written into a file in ``store``, by name, for the people of this site. The
    error goes to the server: it holds their number alone.

    Raises:
        SiteError: the maps differ, or the agreed one cannot be read.
    """
    file = store / FILE_NAME
    file.unlink(missing_ok=True)
    try:
        found = list(differences(label_map_of(cohort), read_label_map(agreed)))
    except DataError as error:
        # The sentence may name a folder of this site.
        raise SiteError(
            "its copy of the consortium's label map cannot be read",
            remedy="correct label_map in its fedgestalt.yaml",
        ) from error
    if not found:
        return
    file.touch(mode=0o600)
    lines = [difference.what for difference in found]
    file.write_text("\n".join([*lines, RESEARCH_USE_ONLY, ""]), encoding="utf-8")
    raise SiteError(
        f"its label map differs from the consortium's in {len(found)}"
        f" {'row' if len(found) == 1 else 'rows'}",
        remedy=f"the file {FILE_NAME} in its store names them",
    )
