"""What an administrator is told without a server, and why a job ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from fedgestalt.cli import main
from fedgestalt.errors import ConfigError
from fedgestalt.federation.operations.admin import AdminSession, read_outcome


def test_a_folder_that_is_no_kit_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no administrator's startup kit"):
        AdminSession(tmp_path)


def test_watching_with_a_folder_that_is_no_kit_is_a_wrong_call(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["job", "watch", str(tmp_path), "some-job"])
    assert done.exit_code == 2
    assert "startup/fed_admin.json" in done.stderr


@pytest.mark.parametrize("content", ["", "[]", '{"admin": {}}', '{"admin": "x"}'])
def test_a_damaged_start_file_is_no_traceback(tmp_path: Path, content: str) -> None:
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "fed_admin.json").write_text(content)
    with pytest.raises(ConfigError):
        AdminSession(tmp_path)


class _Session:
    """FLARE's side of a job that ended without an outcome of ours."""

    def __init__(self, meta: dict[str, Any]) -> None:
        self._meta = meta

    def get_job_meta(self, job: str) -> dict[str, Any]:
        return self._meta


def session(meta: dict[str, Any]) -> AdminSession:
    """An administrator's session whose server says ``meta`` of every job."""
    made = AdminSession.__new__(AdminSession)
    made.server, made._session = "server:8002", _Session(meta)  # type: ignore[assignment]
    return made


def test_a_refused_deployment_is_the_reason(tmp_path: Path) -> None:
    detail = ["server: BYOC not permitted", "bonn: OK"]
    assert session({"job_deploy_detail": detail}).reason("job", tmp_path) == detail[0]


def test_the_cause_of_a_traceback_is_the_reason(tmp_path: Path) -> None:
    (tmp_path / "error_log.txt").write_text(
        "2026-01-01 10:00:00,000 - runner - ERROR - Traceback (most recent call last):\n"
        '  File "x.py", line 1, in f\n'
        "flare.excepts.NotAllowed: this class is not allowed\n"
        "During handling of the above exception, another exception occurred:\n"
        "flare.excepts.Failed: could not start\n"
    )
    assert session({}).reason("job", tmp_path) == "this class is not allowed"


def test_the_last_logged_error_is_the_reason_where_there_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "error_log.txt").write_text(
        "2026-01-01 10:00:00,000 - a - ERROR - first\n2026-01-01 10:00:01,000 - b - ERROR - last\n"
    )
    assert session({}).reason("job", tmp_path) == "last"


def test_nothing_known_is_no_reason(tmp_path: Path) -> None:
    assert session({}).reason("job", tmp_path) == ""


def test_the_sites_that_a_job_names_are_known() -> None:
    meta = {"deploy_map": {"app": ["server", "bonn", "berlin"]}}
    assert session(meta).wanted_sites("job") == ("berlin", "bonn")
    assert session({"deploy_map": {"app": ["@ALL"]}}).wanted_sites("job") == ()


def test_an_outcome_is_found_in_a_result(tmp_path: Path) -> None:
    assert read_outcome(tmp_path) == {}
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "outcome.json").write_text(json.dumps({"status": "completed"}))
    assert read_outcome(tmp_path) == {"status": "completed"}


def test_a_kit_without_its_parts_is_named(tmp_path: Path) -> None:
    admin = {"username": "lead@example.org", "host": "localhost", "port": 8002}
    (tmp_path / "startup").mkdir()
    (tmp_path / "startup" / "fed_admin.json").write_text(json.dumps({"admin": admin}))
    with pytest.raises(ConfigError, match="this startup kit cannot be used"):
        AdminSession(tmp_path)
