"""Every server's kit refuses revoked certificates; sites have nothing to do with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from nvflare.lighter.provision import prepare_builders, prepare_project
from nvflare.lighter.provisioner import Provisioner

from fedgestalt.federation.server.revocation import LIST_FILE, RevokedCertificates, read_revoked
from fedgestalt_provisioning.builder import REVOCATION, REVOKED_FILE

FLARE = "nvflare.lighter.impl"


@pytest.fixture(scope="module", params=[1, 2], ids=["once", "twice"])
def kits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A server and a site, provisioned with our builder, even by mistake with two of it."""
    ours = [{"path": "fedgestalt_provisioning.FedgestaltPolicyBuilder"}] * request.param
    template = {"template_file": "master_template.yml"}
    project = {
        "api_version": 3,
        "name": "trial",
        "description": "a server and a site",
        "participants": [
            {"name": "localhost", "type": "server", "org": "lead", "fed_learn_port": 8002},
            {"name": "bonn", "type": "client", "org": "bonn"},
        ],
        "builders": [
            {"path": f"{FLARE}.workspace.WorkspaceBuilder", "args": template},
            {"path": f"{FLARE}.static_file.StaticFileBuilder", "args": {"scheme": "grpc"}},
            *ours,
            {"path": f"{FLARE}.cert.CertBuilder"},
        ],
    }
    provisioner = Provisioner(str(tmp_path_factory.mktemp("kits")), prepare_builders(project))
    return Path(provisioner.provision(prepare_project(project)).get_result_location())


def components(kit: Path) -> list[str]:
    content = json.loads((kit / "local" / "resources.json.default").read_text())
    return [c["path"] for c in content["components"] if c["id"] == REVOCATION["id"]]


def test_the_server_has_the_component_once_and_a_list_that_revokes_nothing(kits: Path) -> None:
    assert REVOKED_FILE == LIST_FILE
    path = f"{RevokedCertificates.__module__}.{RevokedCertificates.__qualname__}"
    assert components(kits / "localhost") == [path]
    assert read_revoked(kits / "localhost" / "local" / REVOKED_FILE) == frozenset()


def test_sites_do_not_have_it(kits: Path) -> None:
    assert components(kits / "bonn") == []
    assert not (kits / "bonn" / "local" / REVOKED_FILE).exists()
