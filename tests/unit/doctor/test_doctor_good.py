"""Kits that are in order: no problem, and no false alarm."""

from __future__ import annotations

import json
import shutil
import ssl
import subprocess
import sys
from concurrent import futures

import grpc
import pytest
from click.testing import CliRunner, Result
from doctor_trial import (
    ADMIN,
    SERVER,
    SITE,
    Hospital,
    by_state,
    free_port,
    named,
    quiet,
)

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.cli import CALL_WRONG, main
from fedgestalt.doctor import Request, examine, network


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(main, ["doctor", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_a_site_in_order_is_ready_with_the_default_job_and_nothing_is_said_in_vain(
    site: Hospital,
) -> None:
    result = run("--startup-kit", site.kit, "--json")
    assert result.exit_code == 0, result.stdout
    document = json.loads(result.stdout)
    assert document["ok"] is True
    assert {row["state"] for row in document["checks"]} == {"ok"}, result.stdout
    rows = {row["name"]: row for row in document["checks"]}
    assert {name.partition(".")[0] for name in rows} == {
        *("software", "kit", "network", "flare", "policy", "data", "machine", "dry-run")
    }
    assert rows["network.port"]["round_trip_ms"] < 1000
    assert rows["dry-run.model"]["values"] > 1_000_000
    assert rows["dry-run.encoding"]["seconds_per_image"] > 0
    assert not site.store.exists()


def test_every_row_has_a_name_of_its_own_and_figures_hide_nothing(site: Hospital) -> None:
    checks = site.examined()
    assert len({one.name for one in checks}) == len(checks)
    for one in checks:
        assert not {"name", "state", "what", "remedy"} & set(one.figures)
        assert not one.what.endswith(".")
        assert "\n" not in one.what


def test_the_real_grpc_server_takes_our_certificate(site: Hospital) -> None:
    startup = site.kits / SERVER / "startup"
    pair = [((startup / "server.key").read_bytes(), (startup / "server.crt").read_bytes())]
    root = (startup / "rootCA.pem").read_bytes()
    server = grpc.server(futures.ThreadPoolExecutor(1))
    credentials = grpc.ssl_server_credentials(pair, root, require_client_auth=True)
    site.connect_to(server.add_secure_port("localhost:0", credentials))
    server.start()
    try:
        assert by_state(site.examined())["problem"] == set()
        assert named(site.examined(), "network.accepted").state == "ok"
    finally:
        server.stop(None).wait(5)


def test_a_server_of_tls_1_2_is_good_enough(site: Hospital) -> None:
    site.serve(version=ssl.TLSVersion.TLSv1_2)
    checks = site.examined()
    assert by_state(checks)["ok"] == {one.name for one in checks}
    assert named(checks, "network.tls").figures["tls"] == "TLS 1.2"


def test_a_server_that_waits_for_our_greeting_is_good_enough(
    site: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "_PATIENCE", 0.1)
    site.serve(waits=True)
    assert named(site.examined(), "network.accepted").state == "ok"


def test_the_kit_of_an_administrator_is_ready(site: Hospital) -> None:
    port = json.loads(site.startup("fed_client.json").read_text())["servers"][0]["service"][
        "target"
    ].partition(":")[2]
    kit = site.folder / "admin"
    shutil.copytree(site.kits / ADMIN, kit)
    path = kit / "startup" / "fed_admin.json"
    path.write_text(path.read_text().replace("8002", port))
    checks = examine(Request(kit), quiet())
    assert {one.state for one in checks} == {"ok"}, checks
    assert {one.group for one in checks} == {"software", "kit", "network"}
    assert named(checks, "kit.files").figures == {"role": "admin", "participant": ADMIN}


def test_the_kit_of_a_server_is_ready_while_its_port_is_free(site: Hospital) -> None:
    checks = examine(Request(site.server_kit(free_port())), quiet())
    assert {one.state for one in checks} == {"ok"}, checks
    assert {one.group for one in checks} == {"software", "kit", "network", "flare", "machine"}
    assert "is free" in named(checks, "network.listen").what


def test_a_server_that_runs_already_is_no_problem(site: Hospital) -> None:
    port = int(site.endpoint.sockets[0].getsockname()[1])
    checks = examine(Request(site.server_kit(port)), quiet())
    assert {one.state for one in checks} == {"ok"}, checks
    assert named(checks, "network.listen").figures["running"] is True


def test_without_a_kit_software_and_machine_are_examined_and_with_data_the_data(
    site: Hospital,
) -> None:
    bare = examine(Request(job=site.job), quiet())
    assert {one.state for one in bare} == {"ok"}
    assert {one.group for one in bare} == {"software", "machine"}
    with_data = examine(Request(data=site.data, job=site.job), quiet())
    assert {one.state for one in with_data} == {"ok"}
    groups = {one.group for one in with_data}
    assert groups == {"software", "machine", "data", "dry-run"}


def test_the_folder_startup_of_a_kit_names_the_kit(site: Hospital) -> None:
    request = Request(site.kit / "startup", dry_run=False, job=site.job)
    assert named(examine(request, quiet()), "kit.files").figures["participant"] == SITE


def test_text_has_one_line_for_each_check_a_verdict_and_the_notice(site: Hospital) -> None:
    result = run("--startup-kit", site.kit, "--no-dry-run")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[-2:] == ["Ready.", RESEARCH_USE_ONLY]
    assert sum(line.startswith("ok: ") for line in lines) == len(site.examined())


def test_flare_is_not_loaded(site: Hospital) -> None:
    code = (
        "import sys\nfrom fedgestalt.cli import main\n"
        f"main(['doctor', '--startup-kit', {str(site.kit)!r}, '--no-dry-run'], "
        "standalone_mode=False)\n"
        "assert 'torch' in sys.modules\nassert 'nvflare' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_report_starts_without_torch() -> None:
    code = (
        "import sys, fedgestalt.doctor\nassert not {'torch', 'nvflare', 'cv2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("call", ["no kit", "no such data", "an empty folder", "a server's data"])
def test_a_wrong_call_is_refused_in_one_sentence(site: Hospital, call: str) -> None:
    empty = site.folder / "empty"
    empty.mkdir()
    arguments: dict[str, tuple[object, ...]] = {
        "no kit": ("--startup-kit", site.folder / "nowhere"),
        "no such data": ("--startup-kit", site.kit, "--data", site.folder / "nowhere"),
        "an empty folder": ("--startup-kit", empty),
        "a server's data": ("--startup-kit", site.kits / SERVER, "--data", site.data),
    }
    result = run(*arguments[call])
    assert result.exit_code == CALL_WRONG
    assert result.stdout == ""
    (sentence,) = result.stderr.splitlines()
    assert sentence.startswith("fedgestalt: ")
