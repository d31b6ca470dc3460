"""What is kept between rounds comes back as it was, or one sentence says why not."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgestalt.errors import ConfigError, FedgestaltError, SiteError
from fedgestalt.federation.training import checkpoints
from fedgestalt.federation.training.checkpoints import (
    MODELS_KEPT,
    Checkpoint,
    ServerCheckpoints,
    SiteCheckpoints,
)
from fedgestalt.federation.training.model import GlobalModel
from fedgestalt.federation.training.rounds import Aggregation
from fedgestalt.learning.ensemble import SharedState

JOB = "0b1c2d3e-4f50-6172-8394-a5b6c7d8e9f0"
STATE, SENT = "checkpoint.json", "sent.json"


def model(number: float) -> GlobalModel:
    weights = np.full((3, 4), number, np.float32)
    return GlobalModel({"a/neck/weight": weights, "a/head/bias": np.zeros(2, np.float32)})


def after(number: int, job: str = JOB, **changes: Any) -> Checkpoint:
    """The checkpoint of a job after a round, with :func:`model` of that number."""
    fields: dict[str, Any] = {
        "job": job,
        "round": number,
        "spec": "5" * 64,
        "aggregation": dataclasses.asdict(Aggregation()),
        "model": model(number).digest.hex(),
        "ranges": {"a/neck/weight": 0.5, "a/head/bias": 2.0**-126},
        "records": [{"round": n, "sites": ["bonn", "ulm"], "seconds": 0.25} for n in range(number)],
        "transcript": {"schema": "t/1", "certificates": {"bonn": "PEM"}, "rounds": [{}]},
    }
    return Checkpoint(**fields | changes)


def same(one: SharedState | None, other: SharedState) -> bool:
    return (
        one is not None
        and one.keys() == other.keys()
        and all(np.array_equal(values, other[name]) for name, values in one.items())
    )


def times_of(*paths: Path) -> None:
    """Make files, or folders, one second apart: clocks of file systems are coarse."""
    for second, path in enumerate(paths):
        os.utime(path, (second, second))


def fill_the_disk(patch: pytest.MonkeyPatch, name: str) -> None:
    """The disk takes all that comes before a file whose name begins so, and half of that."""
    write_tensors, write_text = checkpoints.write_tensors, Path.write_text

    def save(path: Path, tensors: SharedState) -> None:
        if path.name.startswith(name):
            path.write_bytes(b"half of the mod")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_tensors(path, tensors)

    def write(path: Path, text: str, encoding: str) -> int:
        if path.name.startswith(name):
            path.write_bytes(text.encode()[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write_text(path, text, encoding)

    patch.setattr(checkpoints, "write_tensors", save)
    patch.setattr(Path, "write_text", write)


class ServerDies(BaseException):
    """The process ends here and now."""


def die_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Let the process do so many things to the disk, and no more."""
    left = iter(range(steps))

    def counted(act: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any, **more: Any) -> Any:
            if next(left, None) is None:
                raise ServerDies
            return act(*arguments, **more)

        return step

    for name in ("mkdir", "replace", "rename", "unlink", "write_text"):
        patch.setattr(Path, name, counted(getattr(Path, name)))
    patch.setattr(checkpoints, "write_tensors", counted(checkpoints.write_tensors))


# --- the server's --------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> ServerCheckpoints:
    return ServerCheckpoints(tmp_path / "fedgestalt" / "checkpoints")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "fedgestalt" / "checkpoints"


def refused(server: ServerCheckpoints, job: str) -> str:
    with pytest.raises(ConfigError) as fault:
        server.load(job)
    said = str(fault.value)
    assert said.endswith(".")
    assert "\n" not in said
    return said


def test_a_checkpoint_comes_back_as_it_was_with_its_model(server: ServerCheckpoints) -> None:
    server.save(after(2), model(2).state)
    checkpoint, state = server.load(JOB)
    assert checkpoint == after(2)
    assert same(state, model(2).state)


def test_the_settings_of_a_job_compare_equal_after_the_way_through_the_file(
    server: ServerCheckpoints,
) -> None:
    server.save(after(2), None)
    assert server.load(JOB)[0].aggregation == dataclasses.asdict(Aggregation())


def test_where_the_server_does_not_know_the_model_it_keeps_the_rest(
    server: ServerCheckpoints, folder: Path
) -> None:
    server.save(after(2), None)
    assert server.load(JOB) == (after(2), None)
    assert [path.name for path in (folder / JOB).iterdir()] == [STATE]


def test_the_next_checkpoint_takes_the_place_of_the_last(
    server: ServerCheckpoints, folder: Path
) -> None:
    for number in (1, 2, 3):
        server.save(after(number), model(number).state)
        checkpoint, state = server.load(JOB)
        assert checkpoint.round == number
        assert same(state, model(number).state)
    names = {path.name for path in (folder / JOB).iterdir()}
    assert names == {STATE, f"{model(3).digest.hex()}.safetensors"}


def test_a_round_that_did_not_move_the_model_is_kept_as_well(server: ServerCheckpoints) -> None:
    server.save(after(1), model(1).state)
    server.save(after(2, model=model(1).digest.hex()), model(1).state)
    checkpoint, state = server.load(JOB)
    assert checkpoint.round == 2
    assert same(state, model(1).state)


def test_jobs_do_not_touch_each_other(server: ServerCheckpoints) -> None:
    server.save(after(1, "one"), model(1).state)
    server.save(after(2, "other"), model(2).state)
    server.drop("other")
    assert server.load("one")[0].round == 1
    assert "no checkpoint of job other" in refused(server, "other")


def test_checkpoints_are_for_the_server_alone(server: ServerCheckpoints, folder: Path) -> None:
    server.save(after(1), model(1).state)
    for path in (folder, folder / JOB):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700


def test_a_job_that_is_dropped_leaves_nothing(server: ServerCheckpoints, folder: Path) -> None:
    server.save(after(1), model(1).state)
    server.drop(JOB)
    assert list(folder.iterdir()) == []
    server.drop(JOB)


def test_a_job_without_a_checkpoint_is_named(server: ServerCheckpoints) -> None:
    assert refused(server, JOB).startswith(
        f"resume_from: this server has no checkpoint of job {JOB}; name a training job that"
    )


@pytest.mark.parametrize(
    "job",
    [
        *("", ".", "..", "../x", "../../etc", "/etc", "a/b", "a\\b", "a.b", "~", "job 1"),
        *("job\n", "job\0", "jöb", "²", "-" * 65, "x" * 1000, "one/../other"),
    ],
)
def test_what_is_no_job_id_is_never_looked_for(
    server: ServerCheckpoints, folder: Path, job: str
) -> None:
    server.save(after(1, "one"), model(1).state)
    server.save(after(1, "other"), model(1).state)
    (folder.parent / "x").mkdir()
    (folder.parent / "x" / STATE).write_text((folder / "one" / STATE).read_text())
    said = refused(server, job)
    assert said.startswith("resume_from: ")
    assert "is no job id" in said
    assert len(said) < 400


@pytest.mark.parametrize("job", [JOB, "a", "A" * 64, "0-9"])
def test_what_may_be_a_job_id_is_looked_for(server: ServerCheckpoints, job: str) -> None:
    assert "no checkpoint" in refused(server, job)


# a full disk, and a server that dies


@pytest.mark.parametrize("full_for", [model(2).digest.hex(), "checkpoint"])
def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before_it(
    server: ServerCheckpoints, folder: Path, monkeypatch: pytest.MonkeyPatch, full_for: str
) -> None:
    server.save(after(1), model(1).state)
    with monkeypatch.context() as patch:
        fill_the_disk(patch, full_for)
        with pytest.raises(SiteError) as fault:
            server.save(after(2), model(2).state)
    assert str(fault.value) == (
        "server: the checkpoint of round 2 cannot be written (No space left on device); free disk"
        " space; the checkpoint before it is untouched."
    )
    checkpoint, state = server.load(JOB)
    assert checkpoint == after(1)
    assert same(state, model(1).state)
    assert not list((folder / JOB).glob("*.partial"))


@pytest.mark.parametrize("full_for", [model(1).digest.hex(), "checkpoint"])
def test_a_first_checkpoint_that_cannot_be_written_is_none(
    server: ServerCheckpoints, monkeypatch: pytest.MonkeyPatch, full_for: str
) -> None:
    with monkeypatch.context() as patch:
        fill_the_disk(patch, full_for)
        with pytest.raises(SiteError):
            server.save(after(1), model(1).state)
    assert "no checkpoint of job" in refused(server, JOB)
    server.save(after(2), model(2).state)
    assert server.load(JOB)[0].round == 2


def test_a_place_that_cannot_be_written_is_said_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SiteError, match=r"round 1 cannot be written \(Not a directory\)"):
        ServerCheckpoints(tmp_path / "file" / "checkpoints").save(after(1), None)


def test_whenever_the_server_dies_one_of_the_two_checkpoints_is_whole(
    server: ServerCheckpoints, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It dies before each thing that it does to the disk, one after another."""
    found = []
    for steps in range(20):
        server.drop(JOB)
        server.save(after(1), model(1).state)
        with monkeypatch.context() as patch:
            die_after(steps, patch)
            with contextlib.suppress(ServerDies):
                server.save(after(2), model(2).state)
        checkpoint, state = server.load(JOB)
        assert checkpoint == after(checkpoint.round)
        assert same(state, model(checkpoint.round).state)
        found.append(checkpoint.round)
        server.save(after(3), model(3).state)
        assert server.load(JOB)[0].round == 3
        assert len(list((folder / JOB).iterdir())) == 2
    assert found == sorted(found)
    assert found[4] == 1
    assert found[-1] == 2


def test_only_the_latest_jobs_are_kept(server: ServerCheckpoints, folder: Path) -> None:
    names = [f"job-{number}" for number in range(10)]
    for name in names[:8]:
        server.save(after(1, name), model(1).state)
    times_of(*(folder / name for name in names[:8]))
    server.save(after(2, "job-0"), model(2).state)  # that of the oldest job, but the newest
    for name in names[8:]:
        server.save(after(1, name), model(1).state)
    assert {path.name for path in folder.iterdir()} == {"job-0", *names[3:]}


def test_what_is_left_over_of_old_jobs_does_no_harm(
    server: ServerCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    server.save(after(1), model(1).state)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_age", denied)
        server.save(after(2), model(2).state)
    assert server.load(JOB)[0].round == 2


# damage


def content(folder: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((folder / JOB / STATE).read_text())
    return read


def model_of(folder: Path) -> Path:
    (path,) = (folder / JOB).glob("*.safetensors")
    return path


def damaged(server: ServerCheckpoints, folder: Path) -> None:
    said = refused(server, JOB)
    assert said == f"{folder / JOB}: the checkpoint of job {JOB} is damaged."


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "5", '"text"', "{}", "[" * 100_000, "\udcff", "1" * 5000]
)
def test_a_file_that_is_no_checkpoint_is_damaged(
    server: ServerCheckpoints, folder: Path, text: str
) -> None:
    server.save(after(1), model(1).state)
    (folder / JOB / STATE).write_text(text, encoding="utf-8", errors="surrogateescape")
    damaged(server, folder)


@pytest.mark.parametrize("key", ["schema", "with_model", "checkpoint"])
def test_a_file_that_lacks_a_part_is_damaged(
    server: ServerCheckpoints, folder: Path, key: str
) -> None:
    server.save(after(1), model(1).state)
    changed = content(folder)
    del changed[key]
    (folder / JOB / STATE).write_text(json.dumps(changed))
    damaged(server, folder)


@pytest.mark.parametrize("field", sorted(Checkpoint.model_fields))
@pytest.mark.parametrize("value", [None, -1, "x", [5], {"a": "b"}, "../../../etc/passwd"])
@pytest.mark.parametrize("state", [None, model(1).state], ids=["without", "with"])
def test_a_field_that_makes_no_sense_is_damage_or_what_such_a_field_may_hold(
    server: ServerCheckpoints, folder: Path, field: str, value: object, state: SharedState | None
) -> None:
    server.save(after(1), state)
    changed = content(folder)
    changed["checkpoint"][field] = value
    (folder / JOB / STATE).write_text(json.dumps(changed))
    texts, mappings = {"job", "spec"}, {"aggregation", "transcript"}
    if (isinstance(value, str) and field in texts) or (
        isinstance(value, dict) and field in mappings
    ):
        assert server.load(JOB)[0] == after(1, **{field: value})
    else:
        damaged(server, folder)


def test_a_checkpoint_with_a_field_too_many_or_too_few_is_damaged(
    server: ServerCheckpoints, folder: Path
) -> None:
    server.save(after(1), model(1).state)
    for change in (lambda c: c.update(more=1), lambda c: [c.pop(key) for key in ("more", "round")]):
        changed = content(folder)
        change(changed["checkpoint"])
        (folder / JOB / STATE).write_text(json.dumps(changed))
        damaged(server, folder)


@pytest.mark.parametrize("schema", ["fedgestalt.checkpoint/2", "", None])
def test_a_checkpoint_of_another_version_is_not_read(
    server: ServerCheckpoints, folder: Path, schema: object
) -> None:
    server.save(after(1), model(1).state)
    (folder / JOB / STATE).write_text(json.dumps(content(folder) | {"schema": schema}))
    damaged(server, folder)


def test_a_checkpoint_whose_model_is_gone_is_damaged(
    server: ServerCheckpoints, folder: Path
) -> None:
    server.save(after(1), model(1).state)
    model_of(folder).unlink()
    damaged(server, folder)


def test_another_model_does_not_pass_for_that_of_the_checkpoint(
    server: ServerCheckpoints, folder: Path
) -> None:
    server.save(after(1, "other"), model(1.5).state)
    server.save(after(1), model(1).state)
    model_of(folder).write_bytes(next((folder / "other").glob("*.safetensors")).read_bytes())
    damaged(server, folder)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_wherever_a_file_is_cut_or_altered_it_is_damaged_or_says_the_same(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("server")
    server = ServerCheckpoints(folder)
    server.save(after(1), model(1).state)
    path = data.draw(st.sampled_from([folder / JOB / STATE, model_of(folder)]))
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    octet = data.draw(st.integers(1, 255))
    altered = bytes([whole[at] ^ octet])
    path.write_bytes(whole[:at] + data.draw(st.sampled_from([b"", altered + whole[at + 1 :]])))
    try:
        _, state = server.load(JOB)
    except ConfigError as fault:
        assert str(fault).endswith("is damaged.")  # noqa: PT017  either is right
    else:
        assert same(state, model(1).state)


# --- a site's ------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path) -> SiteCheckpoints:
    return SiteCheckpoints(tmp_path / "checkpoints")


def keep(site: SiteCheckpoints, number: float) -> bytes:
    kept = model(number)
    site.keep(kept.digest, kept.state)
    return kept.digest


def test_a_model_is_found_by_its_digest(site: SiteCheckpoints) -> None:
    digest = keep(site, 1)
    assert same(site.find(digest), model(1).state)
    assert site.find(model(2).digest) is None


def test_before_the_first_model_none_is_found(site: SiteCheckpoints, tmp_path: Path) -> None:
    assert site.find(model(1).digest) is None
    assert site.times_sent(model(1).digest) == 0
    assert list(tmp_path.iterdir()) == []


def test_the_last_models_are_kept_and_older_ones_go(site: SiteCheckpoints, tmp_path: Path) -> None:
    for number in range(6):
        keep(site, number)
        files = (tmp_path / "checkpoints").glob("*.safetensors")
        times_of(*sorted(files, key=lambda path: path.stat().st_mtime_ns))
    found = [number for number in range(6) if site.find(model(number).digest)]
    assert found == [4, 5]
    assert len(found) == MODELS_KEPT


def test_the_model_that_was_just_kept_never_goes_whatever_the_clock_says(
    site: SiteCheckpoints, tmp_path: Path
) -> None:
    for number in range(MODELS_KEPT):
        path = tmp_path / "checkpoints" / f"{keep(site, number).hex()}.safetensors"
        os.utime(path, (2**33, 2**33))
    digest = keep(site, 5)
    assert site.find(digest) is not None
    assert len(list(path.parent.iterdir())) == MODELS_KEPT


def test_a_model_that_a_job_goes_on_from_counts_as_one_of_the_last(
    site: SiteCheckpoints, tmp_path: Path
) -> None:
    names = [f"{keep(site, number).hex()}.safetensors" for number in range(MODELS_KEPT)]
    times_of(*(tmp_path / "checkpoints" / name for name in names))
    assert site.find(model(0).digest) is not None
    keep(site, 5)
    assert site.find(model(0).digest) is not None
    assert site.find(model(1).digest) is None


def test_a_model_that_is_kept_again_is_one_model(site: SiteCheckpoints) -> None:
    first = keep(site, 1)
    second = keep(site, 2)
    assert keep(site, 2) == second
    assert site.find(first) is not None


def test_models_are_for_the_site_alone(site: SiteCheckpoints, tmp_path: Path) -> None:
    keep(site, 1)
    assert stat.S_IMODE((tmp_path / "checkpoints").stat().st_mode) == 0o700


def test_models_outlive_the_process(site: SiteCheckpoints, tmp_path: Path) -> None:
    digest = keep(site, 1)
    site.note_sent(digest)
    again = SiteCheckpoints(tmp_path / "checkpoints")
    assert same(again.find(digest), model(1).state)
    assert again.times_sent(digest) == 1


def test_a_model_that_cannot_be_stored_leaves_the_others(
    site: SiteCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = keep(site, 1), keep(site, 2)
    with monkeypatch.context() as patch:
        fill_the_disk(patch, model(3).digest.hex())
        with pytest.raises(SiteError) as fault:
            keep(site, 3)
    assert str(fault.value) == (
        "the model of the round cannot be stored (No space left on device); free disk space for its"
        " store; models stored earlier are untouched."
    )
    assert site.find(first) is not None
    assert site.find(second) is not None
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize(
    "damage", [lambda b: b"", lambda b: b[:-1], lambda b: b[:-1] + b"\x01", lambda b: b"\xff" * 99]
)
def test_a_damaged_model_is_not_found(
    site: SiteCheckpoints, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "checkpoints" / f"{keep(site, 1).hex()}.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert site.find(model(1).digest) is None
    keep(site, 1)
    assert site.find(model(1).digest) is not None


@pytest.mark.parametrize("kind", ["F8_E4M3", "BF16", "U8"])
def test_a_model_of_other_numbers_is_not_found(
    site: SiteCheckpoints, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "checkpoints" / f"{keep(site, 1).hex()}.safetensors"
    size = {"BF16": 2}.get(kind, 4)
    header = {"a/head/bias": {"dtype": kind, "shape": [size], "data_offsets": [0, 4]}}
    written = json.dumps(header).encode()
    path.write_bytes(len(written).to_bytes(8, "little") + written + bytes(4))
    assert site.find(model(1).digest) is None


def test_another_model_under_the_name_of_a_digest_is_not_found(
    site: SiteCheckpoints, tmp_path: Path
) -> None:
    one, other = keep(site, 1), keep(site, 2)
    folder = tmp_path / "checkpoints"
    (folder / f"{one.hex()}.safetensors").replace(folder / f"{other.hex()}.safetensors")
    assert site.find(other) is None


# what has left it


def test_every_update_that_leaves_is_counted_by_the_model_that_it_is_to(
    site: SiteCheckpoints,
) -> None:
    one, other = model(1).digest, model(2).digest
    for _ in range(3):
        site.note_sent(one)
    site.note_sent(other)
    assert (site.times_sent(one), site.times_sent(other)) == (3, 1)


def test_counts_outlive_the_models_that_they_are_of(site: SiteCheckpoints) -> None:
    digest = keep(site, 1)
    site.note_sent(digest)
    for number in range(2, 6):
        keep(site, number)
    assert site.find(digest) is None
    assert site.times_sent(digest) == 1


def test_the_counts_of_the_models_that_were_sent_last_are_kept(
    site: SiteCheckpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "_COUNTS_KEPT", 3)
    for number in (0, 1, 2, 0, 3):
        site.note_sent(bytes([number]))
    assert [site.times_sent(bytes([n])) for n in range(4)] == [2, 0, 1, 1]


def test_an_update_that_cannot_be_counted_is_not_sent(
    site: SiteCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = model(1).digest
    site.note_sent(digest)
    with monkeypatch.context() as patch:
        fill_the_disk(patch, "sent")
        with pytest.raises(SiteError) as fault:
            site.note_sent(digest)
    assert str(fault.value) == (
        "its record of what leaves it cannot be written (No space left on device); free disk space"
        " for its store; nothing was sent."
    )
    assert site.times_sent(digest) == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [SENT]


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "5", "[" * 100_000, "\udcff"),
        *('{"a": "1"}', '{"a": null}', '{"a": 1.5}', '{"a": 0}', '{"a": -1}', '{"a": [1]}'),
    ],
)
def test_with_a_damaged_record_nothing_is_sent_and_nothing_is_forgotten(
    site: SiteCheckpoints, tmp_path: Path, text: str
) -> None:
    digest = keep(site, 1)
    path = tmp_path / "checkpoints" / SENT
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    before = path.read_bytes()
    for act in (site.times_sent, site.note_sent):
        with pytest.raises(SiteError) as fault:
            act(digest)
        assert str(fault.value).startswith("its record of sent updates is damaged; look at sent")
    assert path.read_bytes() == before
    assert site.find(digest) is not None


def test_a_record_that_cannot_be_read_is_damaged(site: SiteCheckpoints, tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / SENT).mkdir(parents=True)
    with pytest.raises(SiteError, match="is damaged"):
        site.times_sent(model(1).digest)


@given(text=st.text() | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(str))
@settings(max_examples=50, deadline=None)
def test_any_record_is_read_or_refused_in_one_sentence(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    folder = tmp_path_factory.mktemp("site")
    (folder / SENT).write_text(text, encoding="utf-8", errors="replace")
    try:
        assert SiteCheckpoints(folder).times_sent(b"a") == 0
    except FedgestaltError as fault:
        assert "is damaged" in str(fault)  # noqa: PT017  either is right
