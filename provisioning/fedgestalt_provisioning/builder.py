"""A FLARE provisioning Builder: what a startup kit of the consortium must enforce.

Name it in ``project.yml`` after the StaticFileBuilder and before the SignatureBuilder, or in the
participant definition of ``nvflare cert request``: there it runs at ``nvflare package``, at the
site itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from nvflare.lighter.entity import Participant
from nvflare.lighter.spec import Builder, Project, ProvisionContext

OUR_CLASSES: Final = "fedgestalt."
"""A class allow list entry; the trailing dot allows the whole package."""

_NOBODY: Final = dict.fromkeys(("shell_commands", "byoc", "server-predeployed-flwr"), "none")
_LOOK: Final = dict.fromkeys(("view", "app_command", "list_job", "report_version"), "any")
_FETCH: Final = ("download_job", "download_job_components", "get_job_log")

AUTHORIZATION: Final[Mapping[str, Any]] = {
    "format_version": "1.0",
    "permissions": {
        "project_admin": {
            **_LOOK,
            **dict.fromkeys(("submit_job", "clone_job", "manage_job", *_FETCH), "any"),
            "operate": "any",
            **_NOBODY,
        },
        "lead": {
            **_LOOK,
            "submit_job": "any",
            **dict.fromkeys(("clone_job", "manage_job", *_FETCH), "n:submitter"),
            "operate": "o:site",
            **_NOBODY,
        },
        "org_admin": {
            **_LOOK,
            **dict.fromkeys(("submit_job", "clone_job"), "none"),
            **dict.fromkeys(("manage_job", *_FETCH), "o:submitter"),
            "operate": "o:site",
            **_NOBODY,
        },
        "member": _LOOK,
    },
}
"""FLARE's roles, without custom code (BYOC) and without shell commands for anybody."""

PRIVACY: Final[Mapping[str, Any]] = {
    "scopes": [
        {
            "name": "fedgestalt",
            "properties": {},
            "task_data_filters": [],
            "task_result_filters": [
                {"path": "fedgestalt.federation.site.outgoing.OutgoingGuard", "args": {}}
            ],
        }
    ],
    "default_scope": "fedgestalt",
}
"""Every result that leaves a site passes through our guard."""

SERVER_ENVIRONMENT: Final[Mapping[str, str]] = {
    "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "10",
    "NVFL_JOB_STORE_ROOT": "$WORKSPACE/jobs",
}
"""A vanished site does not keep a job open; jobs and results stay in the server's own folder."""

UNFINISHED: Final[Mapping[str, Any]] = {
    "id": "unfinished_jobs",
    "path": "fedgestalt.federation.server.unfinished.UnfinishedJobs",
    "args": {},
}
"""Closes the jobs that a killed server left running."""

PATIENCE: Final[Mapping[str, int]] = {"max_schedule_interval": 30, "max_schedule_count": 100_000}
"""A job that waits for a site is looked at every 30 seconds, for a month; FLARE soon gives up."""

REVOCATION: Final[Mapping[str, Any]] = {
    "id": "revoked_certificates",
    "path": "fedgestalt.federation.server.revocation.RevokedCertificates",
    "args": {},
}
"""The server's component that refuses the certificates in ``local/revoked.txt``."""

REVOKED_FILE: Final = "revoked.txt"
_REVOKED: Final = """\
# Certificates that this server does not accept any more: one SHA-256 fingerprint a line, as
# `openssl x509 -fingerprint -sha256 -noout -in client.crt` prints it. Text after a # is a remark.
# A new line takes effect within seconds, without a restart. docs/how-to/grow-and-shrink.md
"""

STREAMS: Final[Mapping[str, int]] = {
    "streaming_chunk_size": 2**18,
    "streaming_window_size": 2**20,
    "streaming_ack_interval": 2**18,
    "streaming_retry_wait": 30,
    "streaming_retry_timeout": 300,
    "streaming_ack_progress_timeout": 300,
}
"""FLARE's own settings send a model several times over a line of a hospital's usual rate, and time
out; see docs/explanation/network.md. ``local/comm_config.json`` of every kit."""

POLICY_FILE: Final = "fedgestalt.yaml"
_POLICY: Final = """\
# What this site decides for itself; no job can override it. Every key, its meaning and its default:
# docs/reference/site-policy.md. `fedgestalt doctor --startup-kit KIT` checks this file.
# Research use only, not a diagnosis.
"""


class FedgestaltPolicyBuilder(Builder):  # type: ignore[misc]
    """Writes the consortium's policy into every kit, as enforced defaults of FLARE.

    - class allow list: this project's classes beside FLARE's defaults. Plugins are looked up by
      name and need no entry;
    - jobs must be signed by their submitter; nobody may submit custom code (BYOC) or run shell
      commands; ``member`` may look, not submit;
    - every result leaves a site through our guard (``privacy.json``);
    - a site's logs stay at the site: FLARE's log streaming is off;
    - large messages travel in small windows, so that a slow line carries them once;
    - a job process that dies at a site is that site's drop-out, not everybody's failure;
    - the server keeps jobs in its own workspace, runs one job at a time, looks every 30 seconds at
      one that waits for a site, does not wait long for sites that vanished, and closes the jobs
      that an earlier server left running;
    - the server refuses revoked certificates (``local/revoked.txt``);
    - ``local/fedgestalt.yaml``: the site's own policy.

    Args:
        policy: keys of the site policy, the same for all sites of this project; ``{site}`` in a
            path stands for the site's name.
        gpus: GPUs that a site offers to jobs, unless its participant entry has its own ``gpus``.
        gpu_memory_gib: memory of each, likewise.
        max_jobs: jobs that the server runs at a time.
    """

    def __init__(
        self,
        policy: Mapping[str, Any] | None = None,
        gpus: int = 0,
        gpu_memory_gib: int = 0,
        max_jobs: int = 1,
    ) -> None:
        super().__init__()
        self._policy = {
            "data": "/srv/fedgestalt/data",
            "store": "/srv/fedgestalt/store",
            **dict(policy or {}),
        }
        self._gpus, self._gpu_memory, self._max_jobs = gpus, gpu_memory_gib, max_jobs

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        """Write the policy of every kit that this provisioning makes."""
        server = project.get_server()
        self._build_server(server, ctx)
        for site in project.get_clients():
            self._build_site(site, ctx)

    def _build_server(self, server: Participant, ctx: ProvisionContext) -> None:
        resources, path = _read(ctx.get_local_dir(server), "resources.json.default")
        _allow_our_classes(resources)
        _component(resources, "job_scheduler")["args"] |= {"max_jobs": self._max_jobs, **PATIENCE}
        for ours in (REVOCATION, UNFINISHED):
            if ours not in resources["components"]:
                resources["components"].append(dict(ours))
        _write(path, resources)
        local = Path(ctx.get_local_dir(server))
        _write(local / "authorization.json", AUTHORIZATION)
        _stream_in_small_windows(local)
        (local / REVOKED_FILE).write_text(_REVOKED, encoding="utf-8")
        kit = Path(ctx.get_kit_dir(server))
        _require_signed_jobs(kit / "fed_server.json")
        script = kit / "sub_start.sh"
        exports = "".join(
            f'export {name}="${{{name}:-{value}}}"\n' for name, value in SERVER_ENVIRONMENT.items()
        )
        exports += 'mkdir -p "$NVFL_JOB_STORE_ROOT"\n'  # FLARE's scheduler ends where there is none
        text = script.read_text(encoding="utf-8")
        marker = "SECONDS=0\n"
        if text.count(marker) != 1:
            message = f"{script} is not the start script of FLARE 2.9: cannot set its environment"
            raise ValueError(message)
        if exports not in text:
            script.write_text(text.replace(marker, exports + marker), encoding="utf-8")

    def _build_site(self, site: Participant, ctx: ProvisionContext) -> None:
        local = Path(ctx.get_local_dir(site))
        resources, path = _read(local, "resources.json.default")
        _allow_our_classes(resources)
        launcher = _component(resources, "process_launcher")
        launcher["path"] = "fedgestalt.federation.site.launcher.SiteJobLauncher"
        limits = _component(resources, "resource_manager")["args"]
        limits["num_of_gpus"] = site.get_prop("gpus", self._gpus)
        limits["mem_per_gpu_in_GiB"] = site.get_prop("gpu_memory_gib", self._gpu_memory)
        resources["allow_log_streaming"] = False
        resources["components"] = [
            c for c in resources["components"] if c["id"] != "site_log_streamer"
        ]
        _write(path, resources)
        _write(local / "authorization.json", AUTHORIZATION)
        _stream_in_small_windows(local)
        _write(local / "privacy.json", PRIVACY)
        _require_signed_jobs(Path(ctx.get_kit_dir(site)) / "fed_client.json")
        own = {**self._policy, **(site.get_prop("policy") or {})}
        text = _POLICY + yaml.safe_dump(own, sort_keys=False)
        (local / POLICY_FILE).write_text(text, encoding="utf-8")


def _read(folder: str | Path, name: str) -> tuple[dict[str, Any], Path]:
    path = Path(folder) / name
    return json.loads(path.read_text(encoding="utf-8")), path


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _allow_our_classes(resources: dict[str, Any]) -> None:
    allowed = resources.setdefault("class_allow_list", [])
    if OUR_CLASSES not in allowed:
        allowed.append(OUR_CLASSES)
    resources["class_list_enforcement_mode"] = "enforce"


def _component(resources: Mapping[str, Any], name: str) -> dict[str, Any]:
    found: dict[str, Any]
    for found in resources["components"]:
        if found["id"] == name:
            found.setdefault("args", {})
            return found
    message = f"FLARE's resources have no component {name!r}: this Builder knows FLARE 2.9"
    raise ValueError(message)


def _stream_in_small_windows(local: Path) -> None:
    path = local / "comm_config.json"
    known = _read(local, path.name)[0] if path.exists() else {}
    _write(path, {**STREAMS, **known})


def _require_signed_jobs(path: Path) -> None:
    config, path = _read(path.parent, path.name)
    _write(path, {**config, "require_signed_jobs": True})
