"""Job specifications, and the FLARE job folders that they are rendered to and read back from.

A job folder is ``meta.json`` and ``app/config/config_fed_{server,client}.json``. Components are
named by ``path`` and come from ``fedgestalt`` alone, so that a site's class allow list needs one
entry; plugins are chosen by name inside arguments.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml
from pydantic import Field

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.errors import ConfigError, nearest
from fedgestalt.hooks.registry import Registry, read_options
from fedgestalt.learning.presets import PRESETS
from fedgestalt.learning.spec import EnsembleSpec, Spec, default_ensemble
from fedgestalt.learning.weights import check_name
from fedgestalt.similarity.gram import check_one_party

_META, _SERVER, _CLIENT = (
    Path("meta.json"),
    Path("app/config/config_fed_server.json"),
    Path("app/config/config_fed_client.json"),
)
_TASK_REQUEST_SECONDS = 0.1
_TRANSFER_LIMITS = ("streaming_idle_timeout", "np_streaming_per_request_timeout")
"""FLARE's limits for one array on the line; too short for large models on slow lines."""
_OUR_WATCH_DECIDES = {"dead_client_grace_period": 1e9}
"""By itself, FLARE ends a job a minute after the death of a site that it names."""
_AGGREGATOR = (
    *("scope", "rule", "reveal_aggregate_to", "threat_model"),
    *("server_optimiser", "server_learning_rate", "server_momentum"),
)
"""Fields of the training job that are the aggregator's arguments."""
_TENSORBOARD = "nvflare.app_opt.tracking.tb.tb_receiver.TBAnalyticsReceiver"


class JobSpec(Spec):
    """What every job says."""

    template: ClassVar[str]
    summary: ClassVar[str]
    workflow: ClassVar[str]
    executor: ClassVar[str]

    sites: tuple[str, ...] = Field(default=(), description="who must take part; empty: all sites")
    minimum_sites: int = Field(default=3, ge=3, description="FLARE starts the job with as many")
    phase_limit_seconds: float = Field(default=3600.0, gt=0, description="for one site's phase")
    start_limit_seconds: float = Field(
        default=120.0, gt=0, description="for a site's job process to come up"
    )
    silence_limit_seconds: float = Field(
        default=30.0, ge=10, description="after which a silent job process is taken for lost"
    )

    def workflow_arguments(self) -> dict[str, Any]:
        """Arguments of the workflow."""
        raise NotImplementedError

    def executor_arguments(self) -> dict[str, Any]:
        """Arguments of the sites' executor."""
        raise NotImplementedError

    def component_arguments(self) -> dict[str, dict[str, Any]]:
        """Arguments of the server's components, by their ids."""
        return {}

    @classmethod
    def from_arguments(
        cls,
        arguments: Mapping[str, Any],
        components: Mapping[str, Mapping[str, Any]],  # noqa: ARG003  not every job has some
        minimum_sites: int,
    ) -> dict[str, Any]:
        """Fields of the specification from the arguments of the workflow and its components."""
        return {**arguments, "minimum_sites": minimum_sites}


class TrainingJob(JobSpec):
    """Train the global ensemble under zero-sum masks."""

    template: ClassVar[str] = "train_ensemble"
    summary: ClassVar[str] = "train the global ensemble under zero-sum masks"
    workflow: ClassVar[str] = "fedgestalt.federation.training.workflow.EnsembleTrainingWorkflow"
    executor: ClassVar[str] = "fedgestalt.federation.training.executor.EnsembleTrainer"

    ensemble: EnsembleSpec = Field(default_factory=default_ensemble)
    rounds: int = Field(default=6, ge=1, le=10_000)
    max_update_norm: float = Field(
        default=1.0, gt=0, description="largest change of the model per round, in its own norms"
    )
    max_images_per_site: int = Field(
        default=4096, ge=2, description="public bound on a site's training images"
    )
    scope: Literal["all", "encoder"] = Field(
        default="all", description="what is aggregated; encoder: classifiers stay at the sites"
    )
    rule: Literal["mean", "class-weighted"] = Field(
        default="mean",
        description="class-weighted: a classifier's row is averaged over the sites that have the"
        " class",
    )
    reveal_aggregate_to: Literal["server", "sites"] = Field(
        default="server", description="who learns the sum of updates, and with it the model"
    )
    threat_model: Literal["malicious", "honest-but-curious"] = Field(
        default="malicious",
        description="what the server may do without learning more than the sum; honest-but-curious"
        " trusts it to follow the protocol, so that more sites may be lost",
    )
    server_optimiser: Literal["sgd", "adam"] = Field(
        default="sgd",
        description="what makes a step of a round's mean update (FedOpt); sgd: the update itself"
        " but for learning rate and momentum; adam: meant for `optimiser: sgd` in the members",
    )
    server_learning_rate: float = Field(
        default=1.0, ge=1e-6, le=1e6, description="of the server's optimiser"
    )
    server_momentum: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="how much of its last step the model takes again (FedAvgM); 0: none",
    )
    resume_from: str = Field(
        default="",
        pattern=r"^[A-Za-z0-9-]{0,64}$",
        description="id of a training job that ended early, to go on from its last round",
    )

    def workflow_arguments(self) -> dict[str, Any]:
        """See :class:`JobSpec`."""
        fields = self.model_dump(mode="json", exclude=set(_AGGREGATOR))
        return {**fields, "aggregator_id": "aggregator"}

    def component_arguments(self) -> dict[str, dict[str, Any]]:
        """See :class:`JobSpec`."""
        return {"aggregator": self.model_dump(mode="json", include=set(_AGGREGATOR))}

    def executor_arguments(self) -> dict[str, Any]:
        """See :class:`JobSpec`."""
        return {
            "ensemble": self.ensemble.model_dump(mode="json"),
            "phase_limit_seconds": self.phase_limit_seconds,
        }

    @classmethod
    def from_arguments(
        cls,
        arguments: Mapping[str, Any],
        components: Mapping[str, Mapping[str, Any]],
        minimum_sites: int,  # noqa: ARG003  the workflow's own says the same
    ) -> dict[str, Any]:
        """See :class:`JobSpec`."""
        fields = {k: v for k, v in arguments.items() if k != "aggregator_id"}
        return {**fields, **components.get("aggregator", {})}


class MatchingJob(JobSpec):
    """Rank syndromes across hospitals through a privacy-preserving kernel."""

    template: ClassVar[str] = "match"
    summary: ClassVar[str] = "rank syndromes across hospitals through the FLAKE kernel"
    workflow: ClassVar[str] = "fedgestalt.federation.matching.workflow.FlakeSimilarityWorkflow"
    executor: ClassVar[str] = "fedgestalt.federation.matching.executor.FlakeMatcher"

    purpose: ClassVar[str] = "match"

    ensemble: str = Field(
        default="", pattern=r"^([0-9a-f]{64})?$", description="digest of a published ensemble"
    )
    strategy: str = Field(default="isometry", description="name of a matching strategy plugin")
    ranking: str = Field(default="nearest-image", description="name of a ranking strategy plugin")
    kernel: Literal["session", "standing"] = Field(
        default="session",
        description="session: kernel and gallery end with the job; standing: both stay, so that"
        " later jobs and later hospitals use them",
    )
    rotate: bool = Field(
        default=False,
        description="agree on a new version of the standing kernel; all sites enrol anew",
    )
    sponsor: str = Field(
        default="", max_length=200, description="who hands the standing kernel to sites without it"
    )
    computing_sites: tuple[str, ...] = Field(
        default=(),
        description="who computes beside the server, for strategies with several computing parties;"
        " empty: those that hold the standing gallery's shares, or the first sites of the roster",
    )
    released_rows: int = Field(
        default=200, ge=0, description="best rows per query; 0 releases all, for evaluations"
    )
    yardstick_subjects: int = Field(
        default=99,
        ge=0,
        le=999,
        description="most diagnosed patients of its own with whose nearest rows a site measures"
        " whether any known syndrome is near its queries; they count as queries; 0: none",
    )
    hpo_weight: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="weight of HPO terms beside faces, where sites have and release them",
    )
    keep_gram: bool = Field(default=False, description="leave the Gram matrix at the server")

    def workflow_arguments(self) -> dict[str, Any]:
        """See :class:`JobSpec`."""
        return {**self.model_dump(mode="json"), "purpose": self.purpose}

    def executor_arguments(self) -> dict[str, Any]:
        """See :class:`JobSpec`."""
        return {"phase_limit_seconds": self.phase_limit_seconds}

    @classmethod
    def from_arguments(
        cls,
        arguments: Mapping[str, Any],
        components: Mapping[str, Mapping[str, Any]],  # noqa: ARG003
        minimum_sites: int,  # noqa: ARG003  the workflow's own says the same
    ) -> dict[str, Any]:
        """See :class:`JobSpec`."""
        return {k: v for k, v in arguments.items() if k != "purpose"}


class OnboardingJob(MatchingJob):
    """Bring hospitals in that were not in training: they get ensemble and kernel, and match."""

    template: ClassVar[str] = "onboard"
    summary: ClassVar[str] = "bring in hospitals that took no part in training, and match"
    purpose: ClassVar[str] = "onboard"

    kernel: Literal["standing"] = Field(default="standing", description="always standing")


class GalleryJob(MatchingJob):
    """Bring the standing gallery up to date: enrol, withdraw, rotate the kernel; asks nothing."""

    template: ClassVar[str] = "gallery"
    summary: ClassVar[str] = "bring the standing gallery up to date: enrol, withdraw, rotate"
    purpose: ClassVar[str] = "gallery"

    kernel: Literal["standing"] = Field(default="standing", description="always standing")


class DiscoveryJob(JobSpec):
    """Look for groups of alike unsolved cases across hospitals."""

    template: ClassVar[str] = "discover"
    summary: ClassVar[str] = "look for groups of alike unsolved cases across hospitals"
    workflow: ClassVar[str] = "fedgestalt.federation.matching.discovery.DiscoveryWorkflow"
    executor: ClassVar[str] = "fedgestalt.federation.matching.finder.CaseFinder"

    ensemble: str = Field(
        default="", pattern=r"^([0-9a-f]{64})?$", description="digest of a published ensemble"
    )
    strategy: str = Field(
        default="isometry",
        description="name of a matching strategy plugin that the server computes alone",
    )
    level: float = Field(
        default=0.05,
        gt=0,
        le=1,
        description="groups with a q_random above it are not reported: closer than random ones",
    )
    search_level: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="groups with a p_search above it are not reported: closer than what the search"
        " finds where there is no group",
    )

    def workflow_arguments(self) -> dict[str, Any]:
        """See :class:`JobSpec`."""
        return self.model_dump(mode="json")

    def executor_arguments(self) -> dict[str, Any]:
        """See :class:`JobSpec`."""
        return {"phase_limit_seconds": self.phase_limit_seconds}

    @classmethod
    def from_arguments(
        cls,
        arguments: Mapping[str, Any],
        components: Mapping[str, Mapping[str, Any]],  # noqa: ARG003
        minimum_sites: int,  # noqa: ARG003  the workflow's own says the same
    ) -> dict[str, Any]:
        """See :class:`JobSpec`."""
        return dict(arguments)


JOBS: Mapping[str, type[JobSpec]] = {
    job.template: job for job in (TrainingJob, MatchingJob, OnboardingJob, GalleryJob, DiscoveryJob)
}


def template_folder() -> Path:
    """Where the job templates are: inside the wheel, or beside the sources."""
    installed = Path(__file__).parent / "job_templates"
    return installed if installed.is_dir() else Path(__file__).parents[2] / "job_templates"


def job_class(template: str) -> type[JobSpec]:
    """Return the specification behind a template.

    Raises:
        ConfigError: there is no such template.
    """
    if template not in JOBS:
        raise ConfigError(f"no job template is called {template!r}", remedy=nearest(template, JOBS))
    return JOBS[template]


JobT = TypeVar("JobT", bound=JobSpec)


def with_settings(job: JobT, settings: Mapping[str, str]) -> JobT:
    """Change a job by ``key=value`` pairs; keys are dotted, values YAML.

    ``preset`` names settings of a training job to begin with, whatever the order of the pairs.

    Raises:
        ConfigError: a key is unknown or a value wrong.
    """
    fields: dict[str, Any] = job.model_dump(mode="json")
    where = f"settings of job {job.template}"
    if isinstance(job, TrainingJob) and "preset" in settings:
        settings = dict(settings)
        name = settings.pop("preset")
        if name not in PRESETS:
            advice = nearest(name, PRESETS)
            raise ConfigError(f"no preset is called {name!r}", where=where, remedy=advice)
        fields |= {key: _plain(value) for key, value in PRESETS[name]().items()}
    for key, value in settings.items():
        place: Any = fields
        *parents, last = key.split(".")
        for part in parents:
            place = _descend(place, part, key, where)
        index: Any = int(last) if isinstance(place, list) and last.isdecimal() else last
        if isinstance(place, list) and (not isinstance(index, int) or index >= len(place)):
            raise ConfigError(f"{key!r} names no item of its list", where=where)
        try:
            place[index] = chosen = yaml.safe_load(value)
        except (yaml.YAMLError, TypeError):
            raise ConfigError(f"{key!r} cannot be set to {value!r}", where=where) from None
        if isinstance(chosen, dict | list):  # later pairs may name what it leaves to the defaults
            with contextlib.suppress(ConfigError):
                fields = read_options(type(job), fields, where=where).model_dump(mode="json")
    return read_options(type(job), fields, where=where)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Spec) else value


def _descend(place: Any, part: str, key: str, where: str) -> Any:
    if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
        return place[int(part)]
    if isinstance(place, dict) and part in place:
        return place[part]
    known = place if isinstance(place, dict) else ()
    raise ConfigError(f"unknown key {part!r} in {key!r}", where=where, remedy=nearest(part, known))


def check_plugins(job: JobSpec, registry: Registry) -> None:
    """Look up every plugin that a job names.

    Raises:
        PluginError: one is not installed here; server and sites will need it too.
        ConfigError: a backbone does not take the options that the job gives it, they name weights
            by a path, or the strategy needs more computing parties than the job has.
    """
    if isinstance(job, MatchingJob):
        registry.matching.get(job.strategy)
    if isinstance(job, DiscoveryJob):
        check_one_party(registry.matching.get(job.strategy))
    if isinstance(job, TrainingJob):
        for member in job.ensemble.members:
            options = registry.backbones.get(member.backbone).options
            where = f"options of ensemble member {member.name!r}"
            check_name(read_options(options, member.options, where=where), where)


def render_job(job: JobSpec, folder: Path, name: str = "") -> None:
    """Write ``job`` as a FLARE job folder.

    Raises:
        ConfigError: the folder exists or cannot be written.
    """
    try:
        folder.mkdir(parents=True)
        for relative, content in _job_files(job, name or job.template).items():
            path = folder / relative
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    except FileExistsError:
        raise ConfigError("exists already", where=str(folder), remedy="name a new folder") from None
    except OSError as error:
        raise ConfigError(f"cannot be written ({error.strerror})", where=str(folder)) from None


def _job_files(job: JobSpec, name: str) -> dict[Path, dict[str, Any]]:
    meta = {
        "name": name,
        "notice": RESEARCH_USE_ONLY,
        "min_clients": max(job.minimum_sites, len(job.sites)),
        "mandatory_clients": list(job.sites),
        "resource_spec": {},
        "deploy_map": {"app": ["server", *job.sites] if job.sites else ["@ALL"]},
    }
    workflow = {"id": job.template, "path": job.workflow, "args": job.workflow_arguments()}
    components = []
    if isinstance(job, TrainingJob):
        path = "fedgestalt.federation.training.aggregator.ZeroSumMaskAggregator"
        chosen = job.component_arguments()["aggregator"]
        components.append({"id": "aggregator", "path": path, "args": chosen})
        components.append({"id": "metrics", "path": _TENSORBOARD, "args": {}})
    patience = dict.fromkeys(_TRANSFER_LIMITS, job.phase_limit_seconds)
    server = {
        "format_version": 2,
        **patience,
        **_OUR_WATCH_DECIDES,
        "server": {"task_request_interval": _TASK_REQUEST_SECONDS},
        "task_data_filters": [],
        "task_result_filters": [],
        "components": components,
        "workflows": [workflow],
    }
    executor = {"path": job.executor, "args": job.executor_arguments()}
    client = {
        "format_version": 2,
        **patience,
        "submit_task_result_timeout": job.phase_limit_seconds,
        "executors": [{"tasks": ["fgm_*"], "executor": executor}],
        "task_data_filters": [],
        "task_result_filters": [],
        "components": [],
    }
    return {_META: meta, _SERVER: server, _CLIENT: client}


def read_job(folder: Path) -> JobSpec:
    """Read a job folder back.

    Raises:
        ConfigError: it is no job folder of this project, or differs from what its
            specification renders to.
    """
    files = {relative: _read_json(folder / relative) for relative in (_META, _SERVER, _CLIENT)}
    workflows = files[_SERVER].get("workflows")
    workflow = workflows[0] if isinstance(workflows, list) and workflows else None
    named = workflow.get("id") if isinstance(workflow, dict) else None
    job_type = JOBS.get(named) if isinstance(named, str) else None
    if not isinstance(workflow, dict) or not job_type or workflow.get("path") != job_type.workflow:
        raise ConfigError("is no job of this project", where=str(folder / _SERVER))
    minimum = files[_META].get("min_clients", 3)
    arguments = workflow.get("args", {})
    if not isinstance(arguments, dict):
        raise ConfigError("args is no JSON object", where=str(folder / _SERVER))
    fields = job_type.from_arguments(arguments, _components(files[_SERVER]), minimum)
    job = read_options(job_type, fields, where=str(folder / _SERVER))
    for relative, expected in _job_files(job, str(files[_META].get("name"))).items():
        if files[relative] != expected:
            keys = sorted(k for k in expected if files[relative].get(k) != expected[k])
            raise ConfigError(
                f"{', '.join(keys) or 'an extra key'} differs from what the job says elsewhere",
                where=str(folder / relative),
                remedy="render the job again with `fedgestalt job render`",
            )
    return job


def _components(server: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Arguments of the components of a job, by their ids; what is none is left out."""
    listed = server.get("components")
    found = (
        [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    )
    return {
        str(entry.get("id")): entry["args"]
        for entry in found
        if isinstance(entry.get("args"), dict)
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError("is missing: this is no job folder", where=str(path)) from None
    except ValueError:
        raise ConfigError("is not JSON", where=str(path)) from None
    if not isinstance(content, dict):
        raise ConfigError("is not a JSON object", where=str(path))
    return content
