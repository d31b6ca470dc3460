"""One kind of damage each: its check finds it and says what to do, and no other check cries."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from doctor_trial import (
    DAY,
    NOW,
    SERVER,
    SITE,
    Authority,
    Hospital,
    by_state,
    free_port,
    named,
    new_key,
    pem,
    quiet,
)

from fedgestalt.doctor import Request, examine, machine, network
from fedgestalt.federation.site.settings import SiteSettings
from fedgestalt.hooks.registry import Registry

Break = Callable[[Hospital, pytest.MonkeyPatch], object]


@dataclass(frozen=True)
class Damage:
    """A fault, the check that must find it, and words of the sentence that says so."""

    name: str
    breaks: Break
    check: str
    words: tuple[str, ...]
    state: str = "problem"


DAMAGES: list[Damage] = []


def damage(check: str, *words: str, state: str = "problem") -> Callable[[Break], Break]:
    def register(breaks: Break) -> Break:
        name = breaks.__name__.replace("_", " ").strip()
        DAMAGES.append(Damage(name, breaks, check, words, state))
        return breaks

    return register


# --- software ------------------------------------------------------------------------------------


@damage("software.nvflare", "2.8.1", "2.9")
def flare_is_too_old(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    _version(patch, "nvflare", "2.8.1")


@damage("software.nvflare", "2.10.0")
def flare_is_too_new(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    _version(patch, "nvflare", "2.10.0")


@damage("software.nvflare", "not installed")
def flare_is_missing(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    _version(patch, "nvflare", None)


@damage("software.torch", "1.13.1")
def torch_is_too_old(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    _version(patch, "torch", "1.13.1+cpu")


def _version(patch: pytest.MonkeyPatch, package: str, version: str | None) -> None:
    real = importlib.metadata.version

    def stated(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    patch.setattr(importlib.metadata, "version", stated)


@damage("software.plugins", "broken", "ModuleNotFoundError")
def a_plugin_is_broken(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.entry_points(group="fedgestalt")
    broken = importlib.metadata.EntryPoint("broken", "no_such_module_of_ours", "fedgestalt")
    site.registry = Registry([*real, broken])


@damage("software.path", "python3", state="warning")
def the_start_script_would_run_another_python(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    (site.folder / "bin").mkdir()
    other = site.folder / "bin" / "python3"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    patch.setenv("PATH", f"{other.parent}{os.pathsep}{os.environ['PATH']}")


# --- the kit -------------------------------------------------------------------------------------


@damage("kit.files", "fed_client.json", "not valid JSON")
def the_start_file_is_cut_off(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    path = site.startup("fed_client.json")
    path.write_text(path.read_text()[:80])


@damage("kit.files", "resources.json.default", "not valid JSON")
def the_resources_are_cut_off(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    path = site.local("resources.json.default")
    path.write_text(path.read_text()[:300])


@damage("kit.files", "fed_client.json", "host:port")
def the_start_file_names_no_server(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.edit(site.startup("fed_client.json"), servers=[])


@damage("kit.files", "rootCA.pem is missing")
def the_root_certificate_is_missing(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.startup("rootCA.pem").unlink()


@damage("kit.files", "client.key is missing")
def the_key_is_missing(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.startup("client.key").unlink()


@damage("kit.files", "sub_start.sh is empty")
def a_start_script_is_empty(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.startup("sub_start.sh").write_text("")


@damage("kit.files", "authorization.json is missing")
def the_authorization_is_missing(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.local("authorization.json").unlink()
    site.local("authorization.json.default").unlink()


@damage("kit.certificate", "expired", f"{NOW - 3 * DAY:%Y-%m-%d}")
def the_certificate_expired(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.new_certificate(begins=NOW - 300 * DAY, ends=NOW - 3 * DAY)


@damage("kit.certificate", "valid from", "clock")
def the_certificate_is_not_valid_yet(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.new_certificate(begins=NOW + DAY)


@damage("kit.certificate", "expires in 9 days", state="warning")
def the_certificate_expires_soon(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.new_certificate(ends=NOW + 10 * DAY)


@damage("kit.certificate", "not issued by")
def the_certificate_is_of_another_consortium(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.new_certificate(authority=Authority.foreign())


@damage("kit.certificate", "'leuven'", "'bonn'")
def the_certificate_is_that_of_another_site(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.new_certificate(name="leuven")


@damage("kit.certificate", "fed_client.json says 'leuven'")
def the_start_file_names_another_site(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    path = site.startup("fed_client.json")
    client = json.loads(path.read_text())["client"]
    site.edit(path, client=client | {"fqsn": "leuven"})


@damage("kit.certificate", "client.crt is not a certificate")
def the_certificate_is_no_certificate(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.startup("client.crt").write_text("nothing of the kind\n")


@damage("kit.key", "does not belong")
def the_key_is_that_of_another_site(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    shutil.copy(site.kits / "berlin" / "startup" / "client.key", site.startup("client.key"))


@damage("kit.key", "not an open private key")
def the_key_is_damaged(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    path = site.startup("client.key")
    path.write_text(path.read_text()[:400])


@damage("kit.permissions", "client.key", "0644")
def others_can_read_the_key(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.startup("client.key").chmod(0o644)


@damage("kit.permissions", "local/privacy.json", state="warning")
def everybody_can_change_the_policy(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.local("privacy.json").chmod(0o666)


@damage("kit.dates", "dated", "clock", state="warning")
def a_file_is_dated_in_the_future(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    later = (NOW + 3 * DAY).timestamp()
    os.utime(site.local("privacy.json"), (later, later))


@damage("kit.signatures", "fed_client.json")
def a_signed_file_was_edited(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.startup("signature.json").write_text(json.dumps({"fed_client.json": "bm90aGluZw=="}))


# --- the way to the server -----------------------------------------------------------------------


@damage("network.name", "does not resolve", "nowhere.example")
def the_name_does_not_resolve(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    patch.setattr(socket, "getaddrinfo", unknown)
    site.connect_to(8002, "nowhere.example")


@damage("network.name", "no answer within")
def the_name_service_does_not_answer(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    def slow(*_: Any, **__: Any) -> list[Any]:
        time.sleep(1)
        return []

    patch.setattr(network, "SECONDS", 0.2)
    patch.setattr(socket, "getaddrinfo", slow)
    site.connect_to(8002, "slow.example")


@damage("network.port", "refuses connections")
def the_port_is_closed(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        site.connect_to(free.getsockname()[1])


@damage("network.port", "firewall probably blocks")
def a_firewall_drops_what_we_send(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(network, "SECONDS", 0.4)
    listener = site.endpoint.open(backlog=0)
    for _ in range(3):  # no room is left: the kernel drops the next attempt
        stream = socket.socket()
        stream.setblocking(False)
        stream.connect_ex(listener.getsockname())
        site.endpoint.sockets.append(stream)
    site.connect_to(listener.getsockname()[1])


@damage("network.tls", "does not answer TLS")
def the_port_takes_connections_and_says_nothing(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(network, "SECONDS", 0.4)
    site.connect_to(site.endpoint.open().getsockname()[1])


@damage("network.tls", "does not speak TLS")
def another_service_answers(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.connect_to(site.endpoint.serve(lambda stream: stream.sendall(b"220 mail ready\r\n" * 9)))


@damage("network.tls", "closes the connection")
def the_connection_is_cut_in_the_handshake(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.connect_to(site.endpoint.serve(lambda stream: stream.recv(10_000)))


@damage("network.tls", "not for the name 'localhost'", "'elsewhere.example'")
def the_server_has_another_name(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    key = new_key()
    site.serve(site.authority.issue(key, "elsewhere.example"), key)


@damage("network.tls", "'berlin'", "expects 'localhost'")
def another_member_answers_for_the_server(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    key = new_key()
    site.serve(site.authority.issue(key, "berlin", host=SERVER), key)


@damage("network.tls", "no certificate of this consortium", "intercepted", "somebody else")
def tls_is_intercepted(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    key = new_key()
    site.serve(Authority.foreign().issue(key, SERVER), key)


@damage("network.tls", "server's certificate expired", f"{NOW - 2 * DAY:%Y-%m-%d}")
def the_certificate_of_the_server_expired(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    key = new_key()
    site.serve(site.authority.issue(key, SERVER, begins=NOW - 9 * DAY, ends=NOW - 2 * DAY), key)


@damage("network.tls", "server's certificate is not valid before", "clock")
def the_certificate_of_the_server_is_not_valid_yet(
    site: Hospital, patch: pytest.MonkeyPatch
) -> None:
    key = new_key()
    site.serve(site.authority.issue(key, SERVER, begins=NOW + 2 * DAY), key)


@damage("network.tls", "without TLS")
def the_kit_connects_in_the_clear(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    path = site.startup("fed_client.json")
    client = json.loads(path.read_text())["client"]
    site.edit(path, client=client | {"connection_security": "clear"})


@damage("network.accepted", "does not take this kit's certificate", "alert")
def the_server_refuses_our_certificate(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    _serve_others(site, ssl.TLSVersion.TLSv1_3)


@damage("network.accepted", "does not take this kit's certificate", "alert")
def an_older_server_refuses_our_certificate(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    _serve_others(site, ssl.TLSVersion.TLSv1_2)


def _serve_others(site: Hospital, version: ssl.TLSVersion) -> None:
    root = site.folder / "others.pem"
    root.write_bytes(pem(Authority.foreign().certificate))
    site.serve(authority=root, version=version)


@damage("network.accepted", "not in gRPC")
def a_web_server_of_the_consortium_answers(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.serve(alpn="http/1.1")


@damage("network.accepted", "no gRPC server")
def what_answers_talks_no_http_2(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.serve(says=b"HTTP/1.1 400 Bad Request\r\n")


@damage("network.accepted", "no certificate of this site", state="warning")
def the_server_does_not_ask_for_our_certificate(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    path = site.startup("fed_client.json")
    client = json.loads(path.read_text())["client"]
    site.edit(path, client=client | {"connection_security": "tls"})


@damage("network.proxy", "https_proxy", state="warning")
def flare_would_go_through_a_proxy(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    patch.setenv("https_proxy", "http://proxy.example:3128")
    patch.setenv("no_proxy", ".example")


# --- what FLARE allows ---------------------------------------------------------------------------


def _resources(site: Hospital) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(site.local("resources.json.default").read_text())
    return content


@damage("flare.classes", "lacks", "fedgestalt.")
def our_classes_are_not_allowed(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    allowed = [c for c in _resources(site)["class_allow_list"] if c != "fedgestalt."]
    site.edit(site.local("resources.json.default"), class_allow_list=allowed)


@damage("flare.classes", '"*"')
def all_classes_are_allowed(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    allowed = [*_resources(site)["class_allow_list"], "*"]
    site.edit(site.local("resources.json.default"), class_allow_list=allowed)


@damage("flare.classes", "'warn'", "not enforced")
def the_list_of_classes_is_not_enforced(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.edit(site.local("resources.json.default"), class_list_enforcement_mode="warn")


@damage("flare.classes", "local/resources.json lacks")
def a_file_of_the_sites_own_hides_the_consortiums(
    site: Hospital, patch: pytest.MonkeyPatch
) -> None:
    own = _resources(site) | {"class_allow_list": ["nvflare."]}
    site.local("resources.json").write_text(json.dumps(own))


@damage("flare.launcher", "ClientProcessJobLauncher")
def jobs_are_started_by_another_launcher(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    path = "nvflare.app_common.job_launcher.client_process_launcher.ClientProcessJobLauncher"
    components = [
        component | ({"path": path} if component["id"] == "process_launcher" else {})
        for component in _resources(site)["components"]
    ]
    site.edit(site.local("resources.json.default"), components=components)


def _permit(site: Hospital, **rights: Any) -> None:
    path = site.local("authorization.json")
    permissions = json.loads(path.read_text())["permissions"]
    permissions["lead"] |= rights
    site.edit(path, permissions=permissions)


@damage("flare.authorization", "role lead has byoc")
def custom_code_is_allowed(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    _permit(site, byoc="o:site")


@damage("flare.authorization", "role lead has shell_commands")
def shell_commands_are_allowed_but_to_some(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    _permit(site, shell_commands="not n:mallory")


@damage("flare.authorization", "role lead has cat")
def one_shell_command_is_allowed(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    _permit(site, cat=["none", "any"])


@damage("flare.authorization", "byoc", "authorization.json.default")
def the_consortiums_authorization_was_removed(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.local("authorization.json").unlink()


@damage("flare.privacy", "privacy.json is missing")
def the_guard_was_removed(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.local("privacy.json").unlink()


@damage("flare.privacy", "scope open")
def a_job_could_choose_a_scope_without_the_guard(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    path = site.local("privacy.json")
    scopes = json.loads(path.read_text())["scopes"]
    site.edit(path, scopes=[*scopes, {"name": "open", "task_result_filters": []}])


@damage("flare.privacy", "no default scope")
def the_default_scope_does_not_exist(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.edit(site.local("privacy.json"), default_scope="gone")


@damage("flare.signatures", "does not require signed jobs")
def unsigned_jobs_are_taken(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.edit(site.startup("fed_client.json"), require_signed_jobs=False)


# --- the site's own policy -----------------------------------------------------------------------


@damage("policy.rules", "this site has no fedgestalt.yaml")
def the_policy_is_missing(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.local("fedgestalt.yaml").unlink()


@damage("policy.rules", "unknown key 'stoer'")
def the_policy_has_an_unknown_key(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.policy(stoer="/srv")


@damage("policy.rules", "minimum_sites")
def the_policy_has_a_wrong_value(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.policy(minimum_sites=2)


@damage("policy.rules", "'mach'")
def the_policy_names_an_unknown_job(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.policy(jobs=["mach"])


@damage("policy.rules", "'isometri'")
def the_policy_names_an_unknown_strategy(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.policy(strategies=["isometri"])


@damage("policy.rules", "can take part in no job")
def the_policy_leaves_too_few_partners(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.policy(partners=["berlin", SITE])


@damage("policy.data", "there is no data folder")
def the_data_folder_is_missing(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.policy(data=str(site.folder / "gone"))


@damage("policy.data", "there is no data folder cohort")
def the_data_folder_is_named_by_half_a_path_and_missing(
    site: Hospital, patch: pytest.MonkeyPatch
) -> None:
    patch.chdir(site.folder)
    site.policy(data="cohort")


@damage("policy.data", "depends on the folder", state="warning")
def the_data_folder_is_named_by_half_a_path(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(site.folder)
    site.policy(data=f"hospitals/{SITE}")


@damage("policy.store", "is a file")
def the_store_cannot_be_written(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.store.write_text("in the way")


@damage("policy.store", "inside the data folder")
def the_store_lies_in_the_data(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.policy(store=str(site.data / "store"))


@damage("policy.store", "0755", state="warning")
def others_can_look_into_the_store(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.store.mkdir()
    site.store.chmod(0o755)


@damage("policy.store", "depends on the folder", state="warning")
def the_store_is_named_by_half_a_path(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(site.folder)
    site.policy(store="store")


@damage("policy.weights", "there is no weights folder")
def the_weights_folder_is_not_there(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.policy(weights=str(site.folder / "no-weights"))


@damage("policy.weights", "is empty", state="warning")
def the_weights_folder_is_empty(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    (site.folder / "weights").mkdir()
    site.policy(weights=str(site.folder / "weights"))


@damage("policy.weights", "depends on the folder", state="warning")
def the_weights_folder_is_named_by_half_a_path(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    patch.chdir(site.folder)
    (site.folder / "weights").mkdir()
    site.policy(weights="weights")


# --- machine and data ----------------------------------------------------------------------------


@damage("machine.disk", "are free at")
def the_disk_is_full(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))


@damage("machine.disk", "its cache holds", state="warning")
def the_disk_is_full_of_what_the_job_needs(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    (site.store / "cache").mkdir(parents=True)
    site.store.chmod(0o700)
    with (site.store / "cache" / "features-x.bin").open("wb") as file:
        file.truncate(1 << 30)
    patch.setattr(machine.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))


@damage("machine.memory", "the machine has 512 MiB")
def the_machine_is_too_small(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    _memory(patch, total=512 << 20, available=400 << 20)


@damage("machine.memory", "400 MiB of memory are free", state="warning")
def other_programs_take_the_memory(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    _memory(patch, total=64 << 30, available=400 << 20)


def _memory(patch: pytest.MonkeyPatch, **found: int) -> None:
    patch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(**found))


@damage("machine.gpu", "no usable CUDA device")
def a_graphics_card_is_asked_for_and_absent(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.cuda, "is_available", lambda: False)
    site.policy(device="cuda")


@damage("machine.cpu", "999 threads", state="warning")
def more_threads_are_asked_for_than_there_are_cores(
    site: Hospital, patch: pytest.MonkeyPatch
) -> None:
    site.policy(threads=999)


@damage("data.cohort", "1 error", "truncated")
def a_photograph_is_damaged(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    image = next(iter(sorted((site.data / "gmdb_align").iterdir())))
    image.write_bytes(image.read_bytes()[:600])


@damage("data.cohort", "cannot be read")
def the_folder_holds_no_cohort(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    site.policy(data=str(site.kit))


@damage("data.cohort", "1 error", "syndrome … is …, in the agreed map …")
def a_syndrome_is_called_otherwise_than_in_the_consortiums_map(
    site: Hospital, patch: pytest.MonkeyPatch
) -> None:
    agreed = site.data.parent / "agreed"
    shutil.copytree(site.data, agreed)
    (table,) = (agreed / "gmdb_metadata").glob("gmdb_syndromes_*.tsv")
    table.write_text(table.read_text().replace("SYNDROME-NAME-11", "OTHER-NAME", 1))
    site.policy(label_map=str(agreed))


@damage("data.cohort", "one subject only", state="warning")
def a_syndrome_has_one_subject(site: Hospital, patch: pytest.MonkeyPatch) -> None:
    tables = sorted((site.data / "gmdb_metadata").glob("gmdb_rare_*_images_v1.csv"))
    rows = [row.split(",") for table in tables for row in table.read_text().splitlines()[1:]]
    subjects = sorted({row[1] for row in rows if row[2] == rows[0][2]})
    assert len(subjects) == 2
    for table in tables:
        kept = [row for row in table.read_text().splitlines() if f",{subjects[0]}," not in row]
        table.write_text("\n".join(kept) + "\n")


@pytest.mark.parametrize("case", DAMAGES, ids=lambda case: case.name)
def test_damage_is_found_by_its_check_alone(
    site: Hospital, monkeypatch: pytest.MonkeyPatch, case: Damage
) -> None:
    case.breaks(site, monkeypatch)
    checks = site.examined()
    expected: dict[str, set[str]] = {"problem": set(), "warning": set()}
    expected[case.state].add(case.check)
    found = by_state(checks)
    assert {state: found[state] for state in expected} == expected, checks
    said = named(checks, case.check)
    for word in case.words:
        assert word in said.what
    assert said.remedy
    if case.state == "warning":
        assert found["skipped"] == set()


def test_there_is_damage_of_every_kind() -> None:
    assert len(DAMAGES) == len({case.name for case in DAMAGES})
    assert {case.check.partition(".")[0] for case in DAMAGES} == {
        *("software", "kit", "network", "flare", "policy", "machine", "data")
    }


@pytest.mark.parametrize(
    ("file", "old", "new", "check"),
    [
        ("startup/fed_server.json", "localhost:", "fl.example:", "kit.certificate"),
        (
            "startup/fed_server.json",
            'signed_jobs": true',
            'signed_jobs": false',
            "flare.signatures",
        ),
        ("startup/sub_start.sh", "OUTCOME_WAIT", "OUTCOME", "flare.environment"),
        ("local/authorization.json", '"byoc": "none"', '"byoc": "any"', "flare.authorization"),
        ("local/resources.json.default", '"fedgestalt."', '"else."', "flare.classes"),
    ],
)
def test_damage_to_the_kit_of_a_server_is_found_by_its_check_alone(
    site: Hospital, file: str, old: str, new: str, check: str
) -> None:
    kit = site.server_kit(free_port())
    text = (kit / file).read_text()
    assert old in text
    (kit / file).write_text(text.replace(old, new))
    checks = examine(Request(kit), quiet())
    found = by_state(checks)
    assert (found["problem"], found["warning"]) == ({check}, set())
    assert named(checks, check).remedy


def test_a_port_of_the_server_that_another_program_has_is_a_problem(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "SECONDS", 0.3)
    kit = site.server_kit(free_port())
    port = json.loads((kit / "startup" / "fed_server.json").read_text())["servers"][0]["admin_port"]
    with socket.create_server(("", port)):
        checks = examine(Request(kit), quiet())
    assert by_state(checks)["problem"] == {"network.listen"}
    assert "another program" in named(checks, "network.listen").what


@pytest.mark.parametrize(("free", "state"), [(1 << 30, "problem"), (40 << 30, "ok")])
def test_a_graphics_card_needs_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, state: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 80 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Something")
    settings = SiteSettings(data="/data", store="/store", device="cuda")
    (found,) = machine.gpu(settings)
    assert found.state == state
    assert found.what.startswith("NVIDIA Something")
    assert found.figures["free_bytes"] == free


def test_a_processor_without_bfloat16_is_named_and_no_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    (found,) = machine.cpu(None, 1)
    assert found.state == "ok"
    assert found.figures["number_format"] == "float32"
    assert found.figures["features"] == ["avx2"]


def test_more_processes_than_cores_are_a_warning() -> None:
    (found,) = machine.cpu(None, 64)
    assert found.state == "warning"
    assert found.what.startswith("the policy sets 64 processes, the machine has ")
    assert found.remedy.startswith("set processes to ")


@pytest.mark.parametrize(("load", "busy"), [(0.5, False), (1000.0, True)])
def test_a_busy_machine_is_named_for_it_makes_the_dry_run_slow(
    monkeypatch: pytest.MonkeyPatch, load: float, busy: bool
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    (found,) = machine.cpu(None, 1)
    assert found.state == "ok"
    assert ("busy now" in found.what) is busy
    assert found.figures["load"] == load
