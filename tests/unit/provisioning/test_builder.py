"""Kits that are really provisioned enforce this project's policy, as FLARE itself reads it."""

from __future__ import annotations

import json
import stat
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.apis.workspace import Workspace
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.fuel.sec.authz import Authorizer, AuthzContext, Person
from nvflare.lighter.provision import prepare_builders, prepare_project
from nvflare.lighter.provisioner import Provisioner
from nvflare.lighter.spec import Builder, Project, ProvisionContext
from nvflare.private.fed.app.fl_conf import create_privacy_manager

from fedgestalt.federation.server.revocation import RevokedCertificates
from fedgestalt.federation.server.unfinished import UnfinishedJobs
from fedgestalt.federation.site.launcher import SiteJobLauncher
from fedgestalt.federation.site.outgoing import OutgoingGuard
from fedgestalt.federation.site.settings import read_settings
from fedgestalt.jobs import JOBS
from fedgestalt_provisioning.builder import OUR_CLASSES, POLICY_FILE, REVOKED_FILE, STREAMS

SITES = ("bonn", "berlin")
OURS = {"path": "fedgestalt_provisioning.FedgestaltPolicyBuilder"}
FLARE = "nvflare.lighter.impl"
COMPONENTS = sorted({path for job in JOBS.values() for path in (job.workflow, job.executor)})

Kits = Callable[..., Path]


@pytest.fixture(scope="module")
def provision(tmp_path_factory: pytest.TempPathFactory) -> Kits:
    """Provisions a server, two sites and an administrator with ``ours`` of our builders."""
    made: dict[int, Path] = {}

    def kits(*, ours: int) -> Path:
        if ours not in made:
            made[ours] = _provision(tmp_path_factory.mktemp("kits"), [OURS] * ours)
        return made[ours]

    return kits


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kits of a consortium with wishes of its own, one of which bonn overrides."""
    arguments = {
        "policy": {"data": "/data/{site}", "minimum_sites": 4},
        "gpus": 1,
        "gpu_memory_gib": 16,
        "max_jobs": 2,
    }
    bonn = {"gpus": 4, "policy": {"minimum_sites": 5, "jobs": ["match"]}}
    ours = [{**OURS, "args": arguments}]
    return _provision(tmp_path_factory.mktemp("chosen"), ours, {"bonn": bonn})


class NothingProvisioned(Exception):
    """FLARE stopped, said why, and removed what was there."""


def _provision(
    workspace: Path,
    ours: list[dict[str, Any]],
    facts: Mapping[str, Mapping[str, Any]] | None = None,
    other: Builder | None = None,
) -> Path:
    ports = {"fed_learn_port": 8002, "admin_port": 8003}
    server = {"name": "localhost", "type": "server", "org": "lead"} | ports
    lead = {"name": "lead@example.org", "type": "admin", "org": "lead", "role": "project_admin"}
    project: dict[str, Any] = {
        "api_version": 3,
        "name": "trial",
        "description": "a consortium of two",
        "participants": [
            server,
            *(
                {"name": site, "type": "client", "org": site, **(facts or {}).get(site, {})}
                for site in SITES
            ),
            lead,
        ],
        "builders": [
            {
                "path": f"{FLARE}.workspace.WorkspaceBuilder",
                "args": {"template_file": "master_template.yml"},
            },
            {
                "path": f"{FLARE}.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "scheme": "grpc"},
            },
            *ours,
            {"path": f"{FLARE}.cert.CertBuilder"},
            {"path": f"{FLARE}.signature.SignatureBuilder"},
        ],
    }
    builders = prepare_builders(project)
    if other:
        builders.insert(2, other)
    provisioner = Provisioner(str(workspace), builders)
    context = provisioner.provision(prepare_project(project))
    if not context.get_result_location():
        raise NothingProvisioned
    return Path(context.get_result_location())


def allowed(kits: Path, participant: str) -> list[str]:
    path = kits / participant / "local" / "resources.json.default"
    content: list[str] = json.loads(path.read_text()).get("class_allow_list", [])
    return content


@pytest.mark.parametrize("participant", ["localhost", *SITES])
def test_the_kit_of_the_server_and_of_every_site_allows_our_classes_once(
    provision: Kits, participant: str
) -> None:
    assert allowed(provision(ours=1), participant).count("fedgestalt.") == 1


@pytest.mark.parametrize("participant", ["localhost", *SITES])
def test_nothing_else_becomes_allowed_or_forbidden(provision: Kits, participant: str) -> None:
    before = allowed(provision(ours=0), participant)
    assert OUR_CLASSES not in before
    assert allowed(provision(ours=1), participant) == [*before, OUR_CLASSES]


def resources(kits: Path, participant: str) -> dict[str, Any]:
    path = kits / participant / "local" / "resources.json.default"
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def component(kits: Path, participant: str, name: str) -> dict[str, Any]:
    components: list[dict[str, Any]] = resources(kits, participant)["components"]
    (found,) = [item for item in components if item["id"] == name]
    return found


CHANGED = {
    "localhost": ("job_scheduler", "revoked_certificates", "unfinished_jobs"),
    **dict.fromkeys(SITES, ("process_launcher", "resource_manager", "site_log_streamer")),
}
"""The components that ours may change, add or take out."""


@pytest.mark.parametrize("participant", ["localhost", *SITES])
def test_the_rest_of_flares_resources_stays(provision: Kits, participant: str) -> None:
    def rest(kits: Path) -> dict[str, Any]:
        content = resources(kits, participant)
        for key in ("class_allow_list", "class_list_enforcement_mode", "allow_log_streaming"):
            content.pop(key, None)
        components = {item["id"]: item for item in content.pop("components")}
        return content | {k: v for k, v in components.items() if k not in CHANGED[participant]}

    assert len(rest(provision(ours=0))) >= 3
    assert rest(provision(ours=1)) == rest(provision(ours=0))


def test_the_server_waits_for_sites_and_closes_what_it_left_running(provision: Kits) -> None:
    kits = provision(ours=1)
    scheduler = component(kits, "localhost", "job_scheduler")["args"]
    assert scheduler["max_schedule_interval"] == 30
    assert scheduler["max_schedule_count"] * 30 > 30 * 24 * 3600
    path = component(kits, "localhost", "unfinished_jobs")["path"]
    assert path == f"{UnfinishedJobs.__module__}.{UnfinishedJobs.__qualname__}"


@pytest.mark.parametrize("participant", ["localhost", *SITES])
def test_every_kit_streams_in_small_windows(provision: Kits, participant: str) -> None:
    path = provision(ours=1) / participant / "local" / "comm_config.json"
    assert json.loads(path.read_text()) == STREAMS


NEW_WITH_EVERY_KIT = {".crt", ".key", ".pem"}


def files(kits: Path) -> dict[str, bytes]:
    """What a provisioning wrote, but for keys and certificates."""
    return {
        path.relative_to(kits).as_posix(): path.read_bytes()
        for path in kits.rglob("*")
        if path.is_file() and path.suffix not in NEW_WITH_EVERY_KIT
    }


def test_naming_the_builder_twice_changes_nothing(provision: Kits) -> None:
    once, twice = files(provision(ours=1)), files(provision(ours=2))
    assert len(once) > 20
    assert [name for name in once.keys() | twice.keys() if once.get(name) != twice.get(name)] == []


def test_the_kit_of_an_administrator_stays_as_it_is(provision: Kits) -> None:
    lead = provision(ours=0) / "lead@example.org", provision(ours=1) / "lead@example.org"
    assert files(lead[0]) == files(lead[1]) != {}


def authorise(kit: Path, component: str) -> None:
    """What FLARE does at every party before it builds a component of a job."""
    workspace = Workspace(str(kit), site_name=kit.name)
    ComponentPathAuthorizer().authorize_component_config({"path": component}, workspace=workspace)


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("participant", ["localhost", *SITES])
def test_flare_builds_the_components_of_our_jobs_with_the_builder_and_not_without(
    provision: Kits, participant: str, component: str
) -> None:
    authorise(provision(ours=1) / participant, component)
    with pytest.raises(UnsafeComponentError, match="is not in allow_list"):
        authorise(provision(ours=0) / participant, component)


@pytest.mark.parametrize(
    "component", ["fedgestalt_plugins.matching.isometry.Isometry", "fedgestaltx.Spy", "custom.Spy"]
)
def test_flare_builds_no_namesake_and_no_plugin_by_path(provision: Kits, component: str) -> None:
    with pytest.raises(UnsafeComponentError, match="is not in allow_list"):
        authorise(provision(ours=1) / "bonn", component)


# --- who may do what -----------------------------------------------------------------------------

PERMISSIVE = ("shell_commands", "byoc", "server-predeployed-flwr")


def may(
    kits: Path, participant: str, right: str, user: Person, submitter: Person | None = None
) -> bool:
    """What FLARE's own authorizer says from the policy that FLARE finds at the participant."""
    path = Path(Workspace(str(kits / participant)).get_authorization_file_path())
    authorizer = Authorizer(site_org="bonn")
    assert authorizer.load_policy(json.loads(path.read_text())) == ""
    authorized, _ = authorizer.authorize(AuthzContext(right, user, submitter))
    return bool(authorized)


@pytest.mark.parametrize("participant", ["localhost", *SITES])
@pytest.mark.parametrize("role", ["project_admin", "lead", "org_admin", "member"])
@pytest.mark.parametrize("right", PERMISSIVE)
def test_nobody_may_bring_code_or_run_shell_commands(
    provision: Kits, participant: str, role: str, right: str
) -> None:
    assert not may(provision(ours=1), participant, right, Person("ada", "bonn", role))


def test_without_the_builder_a_lead_may_bring_code(provision: Kits) -> None:
    assert may(provision(ours=0), "bonn", "byoc", Person("ada", "bonn", "lead"))


@pytest.mark.parametrize(
    ("role", "submits"),
    [("project_admin", True), ("lead", True), ("org_admin", False), ("member", False)],
)
def test_leads_submit_jobs_and_others_do_not(provision: Kits, role: str, submits: bool) -> None:
    ada = Person("ada", "bonn", role)
    assert may(provision(ours=1), "localhost", "submit_job", ada) is submits
    assert may(provision(ours=1), "bonn", "submit_job", ada) is submits
    assert may(provision(ours=1), "bonn", "view", ada)


@pytest.mark.parametrize("right", ["clone_job", "manage_job", "download_job", "get_job_log"])
def test_a_lead_handles_no_job_but_their_own(provision: Kits, right: str) -> None:
    ada, bert = Person("ada", "bonn", "lead"), Person("bert", "bonn", "lead")
    kits = provision(ours=1)
    assert may(kits, "localhost", right, ada, submitter=ada)
    assert not may(kits, "localhost", right, ada, submitter=bert)


@pytest.mark.parametrize(
    ("participant", "file"),
    [("localhost", "fed_server.json"), *((site, "fed_client.json") for site in SITES)],
)
def test_jobs_must_be_signed(provision: Kits, participant: str, file: str) -> None:
    def config(ours: int) -> dict[str, Any]:
        path = provision(ours=ours) / participant / "startup" / file
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    assert config(1) == {**config(0), "require_signed_jobs": True}


# --- sites ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", SITES)
def test_every_result_passes_our_guard_at_every_site(provision: Kits, site: str) -> None:
    workspace = Workspace(str(provision(ours=1) / site), site_name=site)
    manager = create_privacy_manager(workspace, names_only=False)
    assert manager.is_policy_defined()
    scope = manager.get_scope(None)
    assert [type(f) for f in scope.task_result_filters["out"]] == [OutgoingGuard]
    assert scope.task_data_filters == {"in": [], "out": []}


def test_a_job_cannot_ask_for_a_scope_without_the_guard(provision: Kits) -> None:
    workspace = Workspace(str(provision(ours=1) / "bonn"), site_name="bonn")
    manager = create_privacy_manager(workspace, names_only=False)
    assert list(manager.name_to_scopes) == ["fedgestalt"]


def test_the_server_has_no_guard(provision: Kits) -> None:
    assert not (provision(ours=1) / "localhost" / "local" / "privacy.json").exists()


@pytest.mark.parametrize("site", SITES)
def test_sites_start_job_processes_with_our_launcher(provision: Kits, site: str) -> None:
    launcher = component(provision(ours=1), site, "process_launcher")
    assert launcher["path"] == f"{SiteJobLauncher.__module__}.{SiteJobLauncher.__qualname__}"
    authorise(provision(ours=1) / site, launcher["path"])


def test_the_server_starts_job_processes_as_flare_does(provision: Kits) -> None:
    ours, flares = (component(provision(ours=n), "localhost", "process_launcher") for n in (1, 0))
    assert ours == flares


@pytest.mark.parametrize("site", SITES)
def test_every_site_gets_a_policy_of_its_own_that_can_be_read(provision: Kits, site: str) -> None:
    local = provision(ours=1) / site / "local"
    settings = read_settings(local)
    assert settings.data_folder(site) == Path("/srv/fedgestalt/data")
    assert settings.store_folder(site) == Path("/srv/fedgestalt/store")
    assert "Research use only" in (local / POLICY_FILE).read_text()


def test_the_server_has_no_policy_of_a_site(provision: Kits) -> None:
    assert not (provision(ours=1) / "localhost" / "local" / POLICY_FILE).exists()


def test_the_consortiums_policy_holds_where_a_site_has_none(chosen: Path) -> None:
    settings = read_settings(chosen / "berlin" / "local")
    assert settings.data_folder("berlin") == Path("/data/berlin")
    assert settings.minimum_sites == 4
    assert "match" in settings.jobs
    assert "train_ensemble" in settings.jobs


def test_a_sites_own_policy_wins(chosen: Path) -> None:
    content = yaml.safe_load((chosen / "bonn" / "local" / POLICY_FILE).read_text())
    assert content == {
        "data": "/data/{site}",
        "store": "/srv/fedgestalt/store",
        "minimum_sites": 5,
        "jobs": ["match"],
    }


@pytest.mark.parametrize("site", SITES)
def test_a_sites_logs_stay_at_the_site(provision: Kits, site: str) -> None:
    before, after = (resources(provision(ours=number), site) for number in (0, 1))
    assert before["allow_log_streaming"] is True
    assert after["allow_log_streaming"] is False
    assert "site_log_streamer" in {item["id"] for item in before["components"]}
    assert "site_log_streamer" not in {item["id"] for item in after["components"]}


@pytest.mark.parametrize("site", SITES)
def test_without_a_word_a_site_offers_no_gpu(provision: Kits, site: str) -> None:
    before, after = (component(provision(ours=n), site, "resource_manager") for n in (0, 1))
    limits = {"num_of_gpus": 0, "mem_per_gpu_in_GiB": 0}
    assert after == {**before, "args": {**before["args"], **limits}}


def test_a_sites_own_gpus_win(chosen: Path) -> None:
    limits = {site: component(chosen, site, "resource_manager")["args"] for site in SITES}
    assert limits["berlin"]["num_of_gpus"] == 1
    assert limits["bonn"]["num_of_gpus"] == 4
    assert limits["bonn"]["mem_per_gpu_in_GiB"] == limits["berlin"]["mem_per_gpu_in_GiB"] == 16


# --- the server ----------------------------------------------------------------------------------


def test_the_server_runs_one_job_at_a_time_unless_told_otherwise(
    provision: Kits, chosen: Path
) -> None:
    scheduler = component(provision(ours=1), "localhost", "job_scheduler")
    assert scheduler["args"]["max_jobs"] == 1
    assert component(chosen, "localhost", "job_scheduler")["args"]["max_jobs"] == 2


def test_the_server_looks_for_revoked_certificates_and_begins_with_none(provision: Kits) -> None:
    kit = provision(ours=1) / "localhost"
    watcher = component(provision(ours=1), "localhost", "revoked_certificates")
    assert watcher["path"] == f"{RevokedCertificates.__module__}.{RevokedCertificates.__name__}"
    authorise(kit, watcher["path"])
    lines = (kit / "local" / REVOKED_FILE).read_text().splitlines()
    assert lines
    assert all(line.startswith("#") for line in lines)


def environment(kits: Path, workspace: Path, before: str = "") -> dict[str, str]:
    """What the server's start script exports right before it starts FLARE."""
    script = (kits / "localhost" / "startup" / "sub_start.sh").read_text().splitlines()
    start = script.index("SECONDS=0")
    lines = [line for line in script[:start] if line.startswith(("export NV", "mkdir"))]
    shell = "\n".join([f'WORKSPACE="{workspace}"', before, *lines, "env"])
    run = subprocess.run(
        ["/bin/bash", "-c", shell],
        capture_output=True,
        text=True,
        check=True,
        env={"PATH": "/usr/bin:/bin"},
    )
    return dict(line.split("=", 1) for line in run.stdout.splitlines())


def test_the_server_keeps_jobs_in_its_own_workspace(provision: Kits, tmp_path: Path) -> None:
    workspace = tmp_path / "work space"
    found = environment(provision(ours=1), workspace)
    assert found["NVFL_JOB_STORE_ROOT"] == str(workspace / "jobs")
    assert (workspace / "jobs").is_dir()
    assert found["NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT"] == "10"


def test_an_operator_may_keep_jobs_elsewhere(provision: Kits, tmp_path: Path) -> None:
    before = f"export NVFL_JOB_STORE_ROOT={tmp_path}/elsewhere"
    found = environment(provision(ours=1), tmp_path, before)
    assert found["NVFL_JOB_STORE_ROOT"] == f"{tmp_path}/elsewhere"


def test_the_start_script_is_still_a_script(provision: Kits) -> None:
    script = provision(ours=1) / "localhost" / "startup" / "sub_start.sh"
    subprocess.run(["/bin/bash", "-n", str(script)], check=True)
    before = provision(ours=0) / "localhost" / "startup" / "sub_start.sh"
    assert stat.S_IMODE(script.stat().st_mode) == stat.S_IMODE(before.stat().st_mode)


# --- another FLARE -------------------------------------------------------------------------------


class OtherFlare(Builder):
    """Changes a file that FLARE's builders wrote before ours reads it."""

    def __init__(self, participant: str, file: str, old: str, new: str) -> None:
        super().__init__()
        self.place, self.old, self.new = f"{participant}/{file}", old, new

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        path = Path(ctx.get_wip_dir()) / self.place
        text = path.read_text()
        assert self.old in text
        path.write_text(text.replace(self.old, self.new))


RESOURCES = "local/resources.json.default"


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (
            OtherFlare("localhost", "startup/sub_start.sh", "SECONDS=0", "T=0"),
            "sub_start.sh is not",
        ),
        (OtherFlare("bonn", RESOURCES, '"process_launcher"', '"starter"'), "'process_launcher'"),
        (OtherFlare("bonn", RESOURCES, '"resource_manager"', '"manager"'), "'resource_manager'"),
        (OtherFlare("localhost", RESOURCES, '"job_scheduler"', '"plan"'), "'job_scheduler'"),
    ],
)
def test_a_kit_of_another_flare_is_refused_and_not_left_without_its_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], other: OtherFlare, says: str
) -> None:
    with pytest.raises(NothingProvisioned):
        _provision(tmp_path, [OURS], other=other)
    said = capsys.readouterr().err
    assert says in said
    assert "FLARE 2.9" in said
    assert not list(tmp_path.rglob("prod_00"))


def test_an_allow_list_that_is_not_enforced_becomes_so(tmp_path: Path) -> None:
    other = OtherFlare("bonn", RESOURCES, '"enforce"', '"warn"')
    kits = _provision(tmp_path, [OURS], other=other)
    assert resources(kits, "bonn")["class_list_enforcement_mode"] == "enforce"
