"""Kits that are really provisioned allow this project's classes, and nothing else besides."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.apis.workspace import Workspace
from nvflare.app_common.widgets.component_path_authorizer import ComponentPathAuthorizer
from nvflare.lighter.provision import prepare_builders, prepare_project
from nvflare.lighter.provisioner import Provisioner

from fedgestalt.jobs import JOBS
from fedgestalt_provisioning.builder import OUR_CLASSES

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
            made[ours] = _provision(tmp_path_factory.mktemp("kits"), ours)
        return made[ours]

    return kits


def _provision(workspace: Path, ours: int) -> Path:
    ports = {"fed_learn_port": 8002, "admin_port": 8003}
    server = {"name": "localhost", "type": "server", "org": "lead"} | ports
    lead = {"name": "lead@example.org", "type": "admin", "org": "lead", "role": "project_admin"}
    project: dict[str, Any] = {
        "api_version": 3,
        "name": "trial",
        "description": "a consortium of two",
        "participants": [
            server,
            *({"name": site, "type": "client", "org": site} for site in SITES),
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
            *[OURS] * ours,
            {"path": f"{FLARE}.cert.CertBuilder"},
            {"path": f"{FLARE}.signature.SignatureBuilder"},
        ],
    }
    provisioner = Provisioner(str(workspace), prepare_builders(project))
    context = provisioner.provision(prepare_project(project))
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


@pytest.mark.parametrize("participant", ["localhost", *SITES])
def test_the_rest_of_the_policy_stays(provision: Kits, participant: str) -> None:
    def rest(kits: Path) -> dict[str, Any]:
        path = kits / participant / "local" / "resources.json.default"
        content: dict[str, Any] = json.loads(path.read_text())
        del content["class_allow_list"]
        return content

    assert rest(provision(ours=1)) == rest(provision(ours=0))


def test_naming_the_builder_twice_changes_nothing(provision: Kits) -> None:
    assert allowed(provision(ours=2), "bonn") == allowed(provision(ours=1), "bonn")


def test_the_kit_of_an_administrator_stays_as_it_is(provision: Kits) -> None:
    assert OUR_CLASSES not in allowed(provision(ours=1), "lead@example.org")


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
