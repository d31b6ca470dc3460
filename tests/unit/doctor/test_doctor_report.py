"""What is said, to whom, and what is not said to anybody."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from doctor_trial import Hospital, by_state, named, new_key, pem
from rich.console import Console

from fedgestalt.cohort import Finding
from fedgestalt.doctor import flare_policy, kit, site_policy
from fedgestalt.doctor.data import kinds, unnamed
from fedgestalt.doctor.findings import (
    Check,
    NotCheckedError,
    check,
    counted,
    in_bytes,
    in_time,
    ok,
    problem,
    warning,
)
from fedgestalt.doctor.report import as_document, show, verdict
from fedgestalt.errors import DataError, SiteError

METADATA = "gmdb_metadata"


# --- nobody in the data is named -----------------------------------------------------------------


def _tables(site: Hospital) -> list[Path]:
    return sorted((site.data / METADATA).glob("*_images_v1.csv"))


def _secrets(site: Hospital) -> set[str]:
    """Every subject, image and syndrome of the cohort as its tables have them."""
    found: set[str] = set()
    for table in _tables(site):
        for row in csv.DictReader(table.open()):
            found |= {row["subject"], row["image_id"]}
    return found | {"SYNDROME-NAME", "SUBJECT", "IMAGE"}


def _without_header(site: Hospital) -> None:
    for table in _tables(site):
        table.write_text("".join(table.read_text().splitlines(keepends=True)[1:]))


def _with_unknown_labels(site: Hospital) -> None:
    for table in _tables(site):
        table.write_text(table.read_text().replace(",21", ",77").replace(",11", ",78"))


def _with_broken_images(site: Hospital) -> None:
    for image in sorted((site.data / "gmdb_align").iterdir())[::2]:
        image.write_bytes(b"no picture")


def _without_images(site: Hospital) -> None:
    for image in sorted((site.data / "gmdb_align").iterdir())[::3]:
        image.unlink()


def _with_words_for_labels(site: Hospital) -> None:
    for table in _tables(site):
        table.write_text(table.read_text().replace(",21", ",SYNDROME-NAME-21"))


def _with_a_broken_lookup_table(site: Hospital) -> None:
    path = site.data / METADATA / "lookup_table_v1.txt"
    path.write_text("classes\n[11, 12, 13, 4711]\n")


@pytest.mark.parametrize(
    "breaks",
    [
        _without_header,
        _with_unknown_labels,
        _with_broken_images,
        _without_images,
        _with_words_for_labels,
        _with_a_broken_lookup_table,
    ],
)
def test_faults_of_the_data_are_counted_and_nobody_is_named(site: Hospital, breaks: Any) -> None:
    secrets = _secrets(site)
    assert len(secrets) > 20
    breaks(site)
    checks = site.examined(dry_run=True)
    found = named(checks, "data.cohort")
    assert found.state == "problem"
    assert found.figures["errors"]
    written = json.dumps(as_document([one for one in checks if one.group in ("data", "dry-run")]))
    assert not [secret for secret in secrets if secret in written]
    for number in ("11", "12", "21", "77", "78", "4711"):
        assert f"label {number}" not in written
        assert f"[{number}" not in written


@pytest.mark.parametrize(
    ("finding", "shown"),
    [
        (
            "the image is 90 x 80 pixels, not 112 x 112",
            "the image is 90 x 80 pixels, not 112 x 112",
        ),
        ("label 4711 is not in the syndrome table", "label … is not in the syndrome table"),
        ("syndrome ids [12, 7] are not in the syndrome table", "syndrome ids … are not in the"),
        ("syndromes with one subject only: 12, 7, 30", "syndromes with one subject only: …"),
        ("no column 'label'; the columns are '123', 'P0042', '7'", "no column …"),
        ('no column "it\'s"', "no column …"),
        (
            "the same image belongs to another subject in gmdb_metadata/gmdb_train_images_v1.csv,"
            " row 17",
            "the same image belongs to another subject in gmdb_metadata/gmdb_train_images_v1.csv,"
            " row 17",
        ),
    ],
)
def test_of_a_finding_only_what_names_no_one_is_shown(finding: str, shown: str) -> None:
    assert unnamed(finding).startswith(shown)
    assert not {"4711", "P0042", "123", "[12"} & set(unnamed(finding).replace(",", " ").split())


def test_equal_findings_are_counted_as_one_kind_with_the_first_place() -> None:
    found = [
        Finding("error", "gmdb_metadata/a.csv", row, f"label {row} is unknown", "correct it")
        for row in (4, 9, 11)
    ]
    found.append(Finding("error", "gmdb_metadata/b.csv", None, "the file is empty", "write it"))
    assert kinds(found) == [
        "label … is unknown (gmdb_metadata/a.csv, row 4; 3 times)",
        "the file is empty (gmdb_metadata/b.csv)",
    ]


def test_a_fault_of_the_data_does_not_say_in_which_file() -> None:
    @check("data.cohort")
    def broken() -> Iterator[Check]:
        raise DataError("the image is truncated", where="IMAGE-0042.jpg")
        yield

    assert "0042" not in str(broken())


# --- checks that break ---------------------------------------------------------------------------


def test_a_check_that_breaks_is_a_problem_of_its_own_and_the_others_go_on(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {one.name for one in site.examined()}

    def broken(_: object) -> None:
        message = "/srv/data/SUBJECT-0001.jpg"
        raise RuntimeError(message)

    monkeypatch.setattr(flare_policy, "_guards", broken)
    monkeypatch.setattr(site_policy, "_in_force", broken)
    checks = site.examined()
    assert {one.name for one in checks} == whole
    assert by_state(checks)["problem"] == {"flare.privacy", "policy.rules"}
    said = named(checks, "flare.privacy")
    assert "RuntimeError" in said.what
    assert "SUBJECT" not in said.what + said.remedy


def test_what_a_check_found_before_it_broke_stays() -> None:
    @check("group.detail")
    def half() -> Iterator[Check]:
        yield ok("group.first", "fine")
        raise SiteError("the disk is full", remedy="free space")

    assert half() == [
        ok("group.first", "fine"),
        problem("group.detail", "the disk is full", "free space"),
    ]


def test_a_check_that_cannot_be_made_says_why_and_is_no_problem() -> None:
    @check("group.detail")
    def dependent() -> Iterator[Check]:
        raise NotCheckedError("the file is missing")
        yield

    (found,) = dependent()
    assert found == Check("group.detail", "skipped", "not checked, because the file is missing")
    assert verdict([found]) == "Ready: 1 check not made."


# --- the report ----------------------------------------------------------------------------------

SOME = [
    ok("kit.files", "complete", participant="bonn"),
    warning("kit.dates", "a file is dated in the future", "set the clock"),
    Check("network.tls", "skipped", "not checked, because the port was not reached"),
    problem("policy.rules", "unknown key 'stoer'", "did you mean 'store'?"),
]


def _shown(checks: list[Check], **how: Any) -> str:
    stream = io.StringIO()
    show(checks, Console(file=stream, highlight=False, **how))
    return stream.getvalue()


def test_elsewhere_than_on_a_terminal_a_check_is_one_line_however_long() -> None:
    long = problem("a.b", "word " * 60 + "end", "do " * 50 + "it")
    lines = _shown([*SOME, long], width=40).splitlines()
    assert "ok: kit.files: complete." in lines
    assert "warning: kit.dates: a file is dated in the future. Set the clock." in lines
    assert "problem: policy.rules: unknown key 'stoer'. Did you mean 'store'?" in lines
    (said,) = [line for line in lines if line.startswith("problem: a.b: ")]
    assert said.endswith("do it.")


def test_on_a_terminal_checks_stand_in_groups_with_signs_within_the_width() -> None:
    lines = _shown(SOME, width=60, force_terminal=True, color_system=None).splitlines()
    text = "\n".join(lines)
    assert all(sign in text for sign in "✓!✗·→")
    assert max(map(len, lines)) <= 60
    headings = [line for line in lines if line and not line.startswith(" ")]
    assert headings[:3] == ["Startup kit", "Way to the server", "This site's own policy"]
    columns = {line.index(w) for w in ("complete", "unknown") for line in lines if w in line}
    assert len(columns) == 1


def test_what_a_file_says_is_not_taken_for_markup() -> None:
    assert "[bold]" in _shown([ok("a.b", "a kit called '[bold]'")], force_terminal=True, width=80)


@pytest.mark.parametrize(
    ("checks", "sentence"),
    [
        (SOME[:1], "Ready."),
        (SOME[:2], "Ready: 1 warning."),
        (SOME, "Not ready: 1 problem, 1 warning, 1 check not made."),
        ([SOME[3], SOME[3]], "Not ready: 2 problems."),
    ],
)
def test_the_verdict_counts(checks: list[Check], sentence: str) -> None:
    assert verdict(checks) == sentence
    assert as_document(checks)["ok"] is sentence.startswith("Ready")


def test_the_document_has_a_row_for_each_check_with_its_figures() -> None:
    assert as_document(SOME)["checks"][0] == {
        "name": "kit.files",
        "state": "ok",
        "what": "complete",
        "remedy": "",
        "participant": "bonn",
    }


def test_sizes_times_and_numbers_are_said_for_people() -> None:
    assert [in_bytes(n) for n in (3, 2048, 5 << 20, 3 << 41)] == [
        *("3 bytes", "2.0 KiB", "5.0 MiB", "6.0 TiB")
    ]
    assert [in_time(s) for s in (0.2, 42, 600, 9000)] == [
        *("less than a second", "42 s", "10 min", "2.5 h")
    ]
    assert [counted(n, "image") for n in (1, 1200)] == ["1 image", "1,200 images"]


# --- details of kits and policies ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("expression", "forbids"),
    [
        ("none", True),
        ("No", True),
        ("not any", True),
        (["none", "no"], True),
        (["n:submitter", "not any"], True),
        ("any", False),
        ("o:site", False),
        ("not o:site", False),
        (["none", "n:lead"], False),
        ([], False),
        (None, False),
    ],
)
def test_a_right_is_forbidden_where_flare_gives_it_to_nobody(
    expression: Any, forbids: bool
) -> None:
    from nvflare.fuel.sec.authz import AuthzContext, Person
    from nvflare.security.security import FLAuthorizer

    assert flare_policy._forbids(expression) is forbids
    if expression and forbids:
        policy = {"format_version": "1.0", "permissions": {"lead": {"byoc": expression}}}
        authorizer = FLAuthorizer("bonn", policy)
        for org in ("bonn", "berlin"):
            user = Person("lead", org, "lead")
            assert not authorizer.authorize(AuthzContext("byoc", user, user))[0]


def test_a_running_process_of_flare_is_a_note(site: Hospital) -> None:
    (site.kit / "pid.fl").write_text(f"{os.getpid()}\n")
    checks = site.examined()
    assert by_state(checks)["problem"] == by_state(checks)["warning"] == set()
    found = named(checks, "kit.process")
    assert found.figures["process"] == os.getpid()
    assert "is running" in found.what


def test_a_file_of_a_process_that_ended_is_no_running_process(site: Hospital) -> None:
    (site.kit / "daemon_pid.fl").write_text("999999999\n")
    assert named(site.examined(), "kit.process").figures["process"] is None


def test_a_kit_whose_files_are_all_signed_is_as_it_was_signed(site: Hospital) -> None:
    from nvflare.lighter.utils import sign_folders

    sign_folders(str(site.kit / "startup"), site.authority.key, signature_file="signature.json")
    checks = site.examined()
    assert named(checks, "kit.signatures").state == "ok"
    site.startup("start.sh").write_text("#!/bin/sh\necho changed\n")
    found = named(site.examined(), "kit.signatures")
    assert found.state == "problem"
    assert found.what.startswith("start.sh in startup")


def test_a_certificate_behind_an_intermediate_authority_is_good(site: Hospital) -> None:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from doctor_trial import DAY, NOW, Authority, _builder, _named

    key = new_key()
    root = site.authority
    builder = _builder(_named("state"), root.certificate.subject, key, NOW - DAY, NOW + 90 * DAY)
    builder = builder.add_extension(x509.BasicConstraints(True, 0), critical=True)
    between = Authority(key, builder.sign(root.key, hashes.SHA256()))
    own = new_key()
    chain = between.issue(own, "bonn") + pem(between.certificate)
    site.startup("client.crt").write_bytes(chain)
    site.startup("client.key").write_bytes(pem(own))
    found = kit.open_kit(site.kit)
    now = datetime.now(UTC)
    assert [one.state for one in kit.kit_certificate(found, now)] == ["ok"]
    assert [one.state for one in kit.kit_key(found)] == ["ok"]
    site.startup("client.crt").write_bytes(between.issue(own, "bonn"))
    assert [one.state for one in kit.kit_certificate(found, now)] == ["problem"]
