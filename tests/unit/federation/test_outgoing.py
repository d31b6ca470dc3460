"""The last gate at a site: our messages pass and are written down, everything else is stopped."""

from __future__ import annotations

import json
import stat
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext, FLContextManager
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.workspace import Workspace

from fedgestalt.errors import DataError, SiteError
from fedgestalt.federation.job.handshake import Present
from fedgestalt.federation.job.wire import BODY, FAULT, fault_of, fault_reply, to_shareable
from fedgestalt.federation.matching.messages import (
    Cases,
    Computed,
    Consent,
    Enrolment,
    EnsembleSent,
    GroupsKept,
    HandedOver,
    Holdings,
    KernelReady,
    Ranked,
    SharedEnrolment,
    ShareHoldings,
)
from fedgestalt.federation.site.outgoing import SENT_FILE, OutgoingGuard, record_sent
from fedgestalt.federation.site.settings import FILE_NAME
from fedgestalt.federation.tasks import (
    ANSWERS,
    ENROL,
    JOIN,
    RANK,
    SHARES,
    TASK_PREFIX,
    TRAIN,
    VECTOR,
)
from fedgestalt.federation.training.messages import Published, Receipt, Trained, Uploaded
from fedgestalt.keys import CIPHERTEXT_BYTES, PUBLIC_BYTES, TAG_BYTES
from fedgestalt.messages import Message, size_of
from fedgestalt.secagg import Endorsement, KeyOffer, ShareHeader, ShareOffer, UnmaskShares
from fedgestalt.secagg.shamir import SHARE_BYTES
from fedgestalt.similarity.kernel import KernelKey, SealedContributions, SealedKernels
from fedgestalt.similarity.labels import SEALED_BYTES

HEADER = ShareHeader(
    seed_commitment=bytes(32),
    seed_shares={"berlin": bytes(32), "bonn": bytes(32)},
    root_shares={"berlin": bytes(32), "bonn": bytes(32)},
    pair_secrets={},
    escrow=bytes(TAG_BYTES),
    boxes={"berlin": bytes(32)},
    common_secret=b"",
    signature=bytes(64),
)
BOX = bytes(CIPHERTEXT_BYTES + 2 * SHARE_BYTES + TAG_BYTES)
HANDLES = np.arange(32, dtype=np.uint8).reshape(2, 16)
REPLIES: list[Message] = [
    Present({"classes": "3"}, 1, b"a certificate", "chacha20"),
    Trained(1),
    KeyOffer(bytes(32), bytes(PUBLIC_BYTES), bytes(PUBLIC_BYTES), bytes(64)),
    ShareOffer(bytes(32), HEADER, {"berlin": BOX}),
    Uploaded(bytes(32)),
    Endorsement(bytes(32), bytes(64)),
    UnmaskShares(bytes(32), {"berlin": bytes(SHARE_BYTES), "bonn": bytes(SHARE_BYTES)}),
    Receipt(b"a record", bytes(64)),
    Published("a" * 64, 0),
    Holdings({"a" * 32: "1"}, 1, "4x8"),
    KernelKey(bytes(32), bytes(PUBLIC_BYTES), bytes(64)),
    SealedContributions({"berlin": bytes(CIPHERTEXT_BYTES + 32 + TAG_BYTES)}),
    KernelReady("a" * 32),
    HandedOver(SealedKernels({"berlin": bytes(CIPHERTEXT_BYTES + 200)}), 5),
    EnsembleSent("a" * 64),
    KernelReady("a" * 32),
    Enrolment(
        "a" * 32,
        HANDLES[:1],
        np.eye(2, dtype=np.float32),
        HANDLES,
        np.zeros((2, SEALED_BYTES), np.uint8),
        HANDLES[1:],
        HANDLES[:1],
        bytes(64),
        HANDLES[:1],
    ),
    Consent("a" * 32, {"b" * 64: bytes(64)}),
    ShareHoldings({"berlin": bytes(32)}),
    SharedEnrolment(
        "a" * 32,
        HANDLES[:1],
        bytes(16),
        HANDLES,
        np.zeros((2, SEALED_BYTES), np.uint8),
        HANDLES[1:],
        HANDLES[:1],
        bytes(64),
        (b"rows", b"question"),
        {"berlin": b"sealed"},
        HANDLES[:1],
    ),
    Computed({"berlin": b"sealed"}),
    Ranked("a" * 32),
    Cases("a" * 32, np.eye(2, dtype=np.float32), HANDLES, np.zeros((2, SEALED_BYTES), np.uint8)),
    GroupsKept("a" * 32),
]
SECRET = np.arange(100.0)


class Site:
    """A site with a workspace, and the guard in it."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "store-bonn"
        self.workspace = folder / "workspace"
        for part in ("startup", "local"):
            (self.workspace / part).mkdir(parents=True)
        self.configure(store=str(folder / "store-{site}"))

    def configure(self, **settings: Any) -> None:
        content = yaml.safe_dump({"data": "/nowhere", **settings})
        (self.workspace / "local" / FILE_NAME).write_text(content)

    def context(self, task: str | None) -> FLContext:
        workspace = Workspace(str(self.workspace), "bonn")
        private = {FLContextKey.WORKSPACE_OBJECT: workspace}
        manager = FLContextManager(None, "bonn", "job-7", {}, private)
        context = manager.new_context()
        if task is not None:
            context.set_prop(FLContextKey.TASK_NAME, task, private=True, sticky=False)
        return context

    def send(self, task: str | None, result: Shareable) -> Shareable:
        """What leaves the site when ``task`` results in ``result``."""
        return OutgoingGuard().process(result, self.context(task))

    @property
    def sent(self) -> list[dict[str, Any]]:
        path = self.store / SENT_FILE
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def stopped(self, task: str, result: Shareable) -> str:
        """What the server hears instead of a stopped result; nothing of it may be left."""
        left = self.send(task, result)
        assert left is not result
        assert set(left) <= {FAULT, "__headers__"}
        assert left.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
        assert self.sent == []
        return fault_of(left)


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def task_of(message: Message) -> str:
    return next(task for task, kind in ANSWERS.items() if isinstance(message, kind))


# --- what passes ---------------------------------------------------------------------------------


def test_there_is_a_reply_of_every_kind_here() -> None:
    assert {type(message) for message in REPLIES} == set(ANSWERS.values())
    assert all(task.startswith(TASK_PREFIX) for task in ANSWERS)


@pytest.mark.parametrize("message", REPLIES, ids=lambda message: type(message).__name__)
def test_our_replies_pass_unchanged_and_are_written_down(site: Site, message: Message) -> None:
    task, result = task_of(message), to_shareable(message)
    before = time.time()
    assert site.send(task, result) is result
    assert result == to_shareable(message)
    (line,) = site.sent
    assert line.pop("time") == pytest.approx(before, abs=60)
    size = size_of(message.to_fields())
    assert line == {"job": "job-7", "task": task, "message": message.schema, "bytes": size}


def test_headers_that_flare_adds_pass(site: Site) -> None:
    result = to_shareable(REPLIES[0])
    result.set_header("cookie", "jar")
    assert site.send(JOIN, result) is result


def test_lines_are_added_one_after_another(site: Site) -> None:
    for message in REPLIES:
        site.send(task_of(message), to_shareable(message))
    assert [line["message"] for line in site.sent] == [message.schema for message in REPLIES]


def test_nothing_but_names_and_sizes_is_written_down(site: Site) -> None:
    site.send(JOIN, to_shareable(Present({"classes": "314159"}, 271828, b"161803", "chacha20")))
    text = (site.store / SENT_FILE).read_text()
    for content in ("314159", "271828", "161803", "chacha20"):
        assert content not in text


def test_a_store_that_is_not_there_yet_is_made_for_the_site_alone(site: Site) -> None:
    site.send(JOIN, to_shareable(REPLIES[0]))
    assert stat.S_IMODE(site.store.stat().st_mode) == 0o700


def test_a_fault_passes_and_is_written_down(site: Site) -> None:
    result = fault_reply(SiteError("its data folder is empty"))
    assert site.send(JOIN, result) is result
    (line,) = site.sent
    assert line["message"] == "fault"
    assert line["bytes"] == len("its data folder is empty.")


def test_an_aborted_task_passes(site: Site) -> None:
    result = make_reply(ReturnCode.TASK_ABORTED)
    assert site.send(VECTOR, result) is result
    assert site.sent[0]["message"] == "fault"


@pytest.mark.parametrize("task", ["train", "fgmtrain", "", None])
def test_results_of_other_software_pass_and_are_not_written_down(
    site: Site, task: str | None
) -> None:
    result = Shareable({"weights": SECRET})
    assert site.send(task, result) is result
    assert not site.store.exists()


# --- what is stopped -----------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["weights", "DXO", "fedgestalt2"])
def test_a_result_with_another_part_is_stopped(site: Site, part: str) -> None:
    result = to_shareable(REPLIES[0])
    result[part] = SECRET
    assert "parts that are no message" in site.stopped(JOIN, result)


def test_a_fault_with_another_part_is_stopped(site: Site) -> None:
    result = fault_reply(SiteError("no"))
    result["weights"] = SECRET
    assert "parts that are no message" in site.stopped(JOIN, result)


@pytest.mark.parametrize("said", [SECRET, {"a": "b"}, b"bytes", "x" * 501])
def test_a_fault_that_is_no_sentence_is_stopped(site: Site, said: object) -> None:
    result = make_reply(ReturnCode.EXECUTION_EXCEPTION)
    result[FAULT] = said
    assert "more than a sentence" in site.stopped(JOIN, result)


def test_a_message_cannot_pass_as_a_fault(site: Site) -> None:
    result = fault_reply(SiteError("no"))
    result[BODY] = {"photographs": SECRET}
    assert "more than a sentence" in site.stopped(JOIN, result)


def test_a_fault_cannot_travel_beside_a_message(site: Site) -> None:
    result = to_shareable(REPLIES[0])
    result[FAULT] = SECRET
    assert "no answer to fgm_join" in site.stopped(JOIN, result)


@pytest.mark.parametrize("message", REPLIES, ids=lambda message: type(message).__name__)
def test_an_answer_to_another_task_is_stopped(site: Site, message: Message) -> None:
    others = [task for task, kind in ANSWERS.items() if not isinstance(message, kind)]
    assert len(others) >= len(ANSWERS) - 2
    for task in others:
        assert f"expected {ANSWERS[task].schema}" in site.stopped(task, to_shareable(message))


def test_an_older_version_of_a_message_is_stopped(site: Site) -> None:
    result = to_shareable(REPLIES[0])
    result[BODY]["schema"] = "fedgestalt.present/0"
    assert "expected fedgestalt.present/2" in site.stopped(JOIN, result)


def test_a_message_with_a_field_too_many_is_stopped(site: Site) -> None:
    result = to_shareable(REPLIES[0])
    result[BODY]["photographs"] = SECRET
    assert "unknown field 'photographs'" in site.stopped(JOIN, result)


def test_a_message_with_something_else_in_a_field_is_stopped(site: Site) -> None:
    result = to_shareable(Published("a" * 64, 0))
    result[BODY]["digest"] = SECRET
    assert "field 'digest'" in site.stopped("fgm_publish", result)


@pytest.mark.parametrize("place", ["boxes", "seed_shares"])
def test_a_message_with_something_else_deep_inside_is_stopped(site: Site, place: str) -> None:
    result = to_shareable(next(m for m in REPLIES if isinstance(m, ShareOffer)))
    result[BODY]["header"][place]["berlin"] = SECRET
    assert f"field '{place}' holds ndarray" in site.stopped(SHARES, result)


def test_an_update_cannot_leave_in_place_of_the_word_that_it_is_ready(site: Site) -> None:
    result = to_shareable(Trained(1))
    result[BODY]["round"] = SECRET
    assert "field 'round'" in site.stopped(TRAIN, result)
    result[BODY] |= {"round": 1, "update": SECRET}
    assert "unknown field 'update'" in site.stopped(TRAIN, result)


@pytest.mark.parametrize("body", [None, SECRET, [1, 2], "text", {}])
def test_a_result_without_a_message_is_stopped(site: Site, body: object) -> None:
    assert "its outgoing guard stopped" in site.stopped(TRAIN, Shareable({BODY: body}))


def test_an_empty_result_is_stopped(site: Site) -> None:
    assert "its outgoing guard stopped" in site.stopped(RANK, Shareable())


@pytest.mark.parametrize("task", ["fgm_weights", "fgm_", "fgm_joining"])
def test_a_result_of_a_task_that_this_version_does_not_know_is_stopped(
    site: Site, task: str
) -> None:
    assert f"no answer to {task}" in site.stopped(task, to_shareable(REPLIES[0]))


# --- what cannot be written down -----------------------------------------------------------------


def test_what_cannot_be_written_down_does_not_leave(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    site.configure(store=str(tmp_path / "file" / "store"))
    (rows,) = (message for message in REPLIES if isinstance(message, Enrolment))
    said = site.stopped(ENROL, to_shareable(rows))
    assert "its record of what leaves it cannot be written (Not a directory)" in said
    assert str(tmp_path) not in said


def test_a_record_that_is_no_file_stops_everything(site: Site) -> None:
    (site.store / SENT_FILE).mkdir(parents=True)
    left = site.send(JOIN, to_shareable(REPLIES[0]))
    assert set(left) == {FAULT, "__headers__"}
    assert "cannot be written (Is a directory)" in fault_of(left)


def test_a_fault_that_cannot_be_written_down_does_not_leave_as_it_is(site: Site) -> None:
    (site.store / SENT_FILE).mkdir(parents=True)
    left = site.send(JOIN, fault_reply(SiteError("its subject 7 is missing")))
    assert "subject 7" not in fault_of(left)
    assert "cannot be written" in fault_of(left)


def test_without_the_sites_settings_nothing_leaves(site: Site) -> None:
    (site.workspace / "local" / FILE_NAME).write_text("nonsense: 1\n")
    said = site.stopped(JOIN, to_shareable(REPLIES[0]))
    assert "its settings or the job's options are wrong" in said
    assert "nonsense" not in said


def test_an_error_about_data_leaves_without_what_it_says(site: Site) -> None:
    result = fault_reply(DataError("row 7 names SUBJECT-0007", where="/data/table.csv"))
    assert "SUBJECT" not in fault_of(site.send(JOIN, result))


# --- what leaves beside the answers to tasks -----------------------------------------------------


def test_a_masked_vector_is_written_down_like_an_answer(site: Site) -> None:
    site.send(JOIN, to_shareable(REPLIES[0]))
    before = time.time()
    record_sent(site.store, "job-7", VECTOR, "masked vector", 4000)
    _, line = site.sent
    assert line.pop("time") == pytest.approx(before, abs=60)
    assert line == {"job": "job-7", "task": VECTOR, "message": "masked vector", "bytes": 4000}
    assert list(site.sent[0]) == list(site.sent[1])


def test_a_store_is_made_for_the_record_of_a_vector_as_well(site: Site) -> None:
    record_sent(site.store, "job-7", VECTOR, "masked vector", 4000)
    assert stat.S_IMODE(site.store.stat().st_mode) == 0o700


def test_a_vector_that_cannot_be_written_down_is_told_to_whoever_sends_it(site: Site) -> None:
    (site.store / SENT_FILE).mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        record_sent(site.store, "job-7", VECTOR, "masked vector", 4000)
