"""Open withdrawals at the server, receipts at the owner."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedgestalt.errors import ConfigError, ServerError
from fedgestalt.federation.matching.messages import Handles
from fedgestalt.federation.matching.receipts import Receipts
from fedgestalt.federation.matching.withdrawals import Withdrawals

JOB = "job-1"
CERTIFICATE = b"certificate"


def handles(*numbers: int) -> Handles:
    return np.array([[number] * 16 for number in numbers], np.uint8).reshape(-1, 16)


def rows(*numbers: int) -> dict[str, str]:
    return {bytes([number] * 16).hex(): f"image-{number}" for number in numbers}


def kept(folder: Path, job: str = JOB) -> Withdrawals:
    return Withdrawals(folder / "withdrawals.json", job).open()


def begun(folder: Path | None) -> Withdrawals:
    withdrawals = kept(folder) if folder else Withdrawals(None, JOB)
    withdrawals.take_part(["berlin", "bonn"])
    return withdrawals


def sign(withdrawals: Withdrawals, site: str) -> None:
    signatures = dict.fromkeys(withdrawals.unsigned(site), site.encode())
    withdrawals.sign(site, signatures, CERTIFICATE)


def test_all_owners_rows_of_a_job_are_one_list_in_an_order_that_says_nothing() -> None:
    withdrawals = begun(None)
    withdrawals.add("berlin", handles(5, 1))
    withdrawals.add("bonn", handles(3))
    ((name, listed),) = withdrawals.unsigned("bonn").items()
    assert np.array_equal(listed, handles(1, 3, 5))
    assert withdrawals.receipts("berlin").keys() == withdrawals.receipts("bonn").keys() == {name}


def test_what_is_said_again_is_not_new() -> None:
    withdrawals = begun(None)
    assert np.array_equal(withdrawals.add("berlin", handles(2, 1)), handles(2, 1))
    assert np.array_equal(withdrawals.add("berlin", handles(1, 2, 3)), handles(3))
    assert not len(withdrawals.add("berlin", handles(1)))


def test_a_list_waits_for_those_who_had_taken_part_and_for_nobody_who_came_later(
    tmp_path: Path,
) -> None:
    begun(tmp_path).add("berlin", handles(1))
    withdrawals = kept(tmp_path, "job-2")
    withdrawals.take_part(["ulm"])
    withdrawals.add("berlin", handles(2))
    assert len(withdrawals.unsigned("bonn")) == 2
    (listed,) = withdrawals.unsigned("ulm").values()
    assert np.array_equal(listed, handles(2))


def test_signatures_survive_and_a_list_goes_when_the_last_owner_has_its_receipt(
    tmp_path: Path,
) -> None:
    withdrawals = begun(tmp_path)
    withdrawals.add("berlin", handles(1))
    withdrawals.add("bonn", handles(2))
    sign(withdrawals, "berlin")
    withdrawals.close("berlin")  # bonn has not signed
    withdrawals = kept(tmp_path)
    assert withdrawals.awaited == ["bonn"]
    assert not withdrawals.unsigned("berlin")
    sign(withdrawals, "bonn")
    (said,) = withdrawals.receipts("bonn").values()
    assert said.signatures == {"berlin": b"berlin", "bonn": b"bonn"}
    assert said.certificates.keys() == said.signatures.keys()
    withdrawals.close("berlin")
    withdrawals = kept(tmp_path)
    assert withdrawals.receipts("berlin") == {}
    assert len(withdrawals.receipts("bonn")) == 1
    withdrawals.close("bonn")
    assert kept(tmp_path).receipts("bonn") == {}


def test_jobs_at_the_same_time_take_nothing_from_each_other(tmp_path: Path) -> None:
    one, other = begun(tmp_path), kept(tmp_path, "job-2")
    one.add("berlin", handles(1))
    other.take_part(["ulm"])
    other.add("berlin", handles(2))
    one.add("berlin", handles(3))
    (first, second) = kept(tmp_path).unsigned("bonn").values()
    assert np.array_equal(first, handles(1, 3))
    assert np.array_equal(second, handles(2))
    assert kept(tmp_path).awaited == ["berlin", "bonn", "ulm"]


def test_a_list_that_somebody_is_to_sign_does_not_grow(tmp_path: Path) -> None:
    withdrawals = begun(tmp_path)
    withdrawals.add("berlin", handles(1))
    before = withdrawals.unsigned("bonn")
    withdrawals.add("berlin", handles(2))
    assert before.keys() < withdrawals.unsigned("bonn").keys()


def test_a_damaged_list_is_the_servers_fault(tmp_path: Path) -> None:
    begun(tmp_path).add("berlin", handles(1))
    (path,) = tmp_path.iterdir()
    content = json.loads(path.read_text())
    content["open"][0]["handles"] = ["01"]
    path.write_text(json.dumps(content))
    with pytest.raises(ServerError, match=r"damaged .*; remove it; in the next job owners say"):
        kept(tmp_path)


def test_a_receipt_names_who_has_not_signed_until_nobody_is_left(tmp_path: Path) -> None:
    receipts = Receipts(tmp_path)
    receipts.begin("job", {**rows(1), bytes([9] * 16).hex(): ""}, ["bonn", "berlin"])
    (receipt,) = receipts.open()
    assert receipt.images == ("image-1",)
    assert receipt.not_signed == ("berlin", "bonn")
    listed = {*receipt.rows, *rows(5)}
    receipts.keep(receipt.extended(listed, {"bonn": (b"s", CERTIFICATE)}, ["ulm"]))
    (receipt,) = receipts.open()
    assert receipt.not_signed == ("berlin", "ulm")  # berlin, though the server does not say so
    assert set(receipt.handles) == listed
    both = dict.fromkeys(["berlin", "ulm"], (b"s", CERTIFICATE))
    receipts.keep(receipt.extended(listed, both, []))
    assert receipts.open() == []
    (receipt,) = receipts.all()
    assert receipt.sites.keys() == {"berlin", "bonn", "ulm"}
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "withdrawals").iterdir()] == [0o600]


def test_signatures_over_another_list_do_not_count_for_this_one(tmp_path: Path) -> None:
    receipts = Receipts(tmp_path)
    receipts.begin("job", rows(1), ["berlin", "bonn"])
    receipt = receipts.open()[0].extended([*rows(1, 2)], {"bonn": (b"s", CERTIFICATE)}, [])
    receipt = receipt.extended([*rows(1)], {"berlin": (b"s", CERTIFICATE)}, [])
    assert receipt.sites.keys() == {"berlin"}
    assert receipt.not_signed == ("bonn",)


def test_what_is_taken_back_twice_in_a_job_has_two_receipts(tmp_path: Path) -> None:
    receipts = Receipts(tmp_path)
    for number in (1, 2):
        receipts.begin("job", rows(number), ["bonn"])
    assert [(r.name, r.job, r.images) for r in receipts.open()] == [
        ("job-2", "job", ("image-2",)),
        ("job", "job", ("image-1",)),
    ]


@pytest.mark.parametrize("change", [{"handles": []}, {"rows": []}, {"schema": "x"}, {"sites": 1}])
def test_a_damaged_receipt_is_a_sentence(tmp_path: Path, change: dict[str, object]) -> None:
    receipts = Receipts(tmp_path)
    receipts.begin("job", rows(1), ["bonn"])
    path = tmp_path / "withdrawals" / "job.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ConfigError, match=r"receipt of a withdrawal is damaged; bring it back"):
        receipts.all()
