from __future__ import annotations

from pathlib import Path

import pytest

from fedgestalt.demo.run import _work_folder
from fedgestalt.errors import SiteError


def test_the_logs_of_a_failed_seed_are_where_the_sentence_says(tmp_path: Path) -> None:
    with pytest.raises(SiteError) as caught, _work_folder(tmp_path) as work:
        (work / "seed-7").mkdir()
        log = work / "seed-7" / "train.log"
        log.write_text("why it failed")
        (work / "seed-6-train.log").write_text("earlier")
        raise SiteError("the job failed", remedy=f"see {log}")
    named = Path(caught.value.remedy.removeprefix("see "))
    assert named.read_text() == "why it failed"
    assert (tmp_path / "logs" / "seed-6-train.log").read_text() == "earlier"
    assert not list(tmp_path.glob(".work-*"))
