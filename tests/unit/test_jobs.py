"""Job specifications and FLARE job folders say the same."""

from __future__ import annotations

import importlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.apis.executor import Executor
from nvflare.apis.impl.controller import Controller
from nvflare.app_common.abstract.aggregator import Aggregator
from nvflare.app_common.default_component_policy import DEFAULT_CLASS_ALLOW_LIST

from fedgestalt.errors import ConfigError, FedgestaltError, SiteError
from fedgestalt.federation.site.settings import SiteSettings
from fedgestalt.federation.training.aggregator import ZeroSumMaskAggregator
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import (
    JOBS,
    DiscoveryJob,
    JobSpec,
    MatchingJob,
    TrainingJob,
    check_plugins,
    job_class,
    read_job,
    render_job,
    template_folder,
    with_settings,
)
from fedgestalt.learning.presets import PRESETS
from fedgestalt.learning.spec import EnsembleSpec, MemberSpec, TrainingSpec

SERVER, CLIENT = "app/config/config_fed_server.json", "app/config/config_fed_client.json"
FILES = ("meta.json", SERVER, CLIENT)
DIGEST = "0123456789abcdef" * 4

site_names = st.lists(
    st.from_regex(r"[a-z][a-z0-9-]{0,5}", fullmatch=True), max_size=3, unique=True
)
common = {
    "sites": site_names.map(tuple),
    "minimum_sites": st.integers(3, 9),
    "phase_limit_seconds": st.floats(0.001, 1e6),
    "start_limit_seconds": st.floats(0.001, 1e6),
    "silence_limit_seconds": st.floats(10, 1e6),
}
training = st.builds(
    TrainingSpec,
    epochs=st.integers(1, 5),
    batch_size=st.integers(2, 64),
    learning_rate=st.floats(1e-6, 1),
    dropout=st.floats(0, 0.9),
    proximal=st.floats(0, 10),
    softmax=st.sampled_from(["all", "present"]),
    batch_norm=st.sampled_from(["shared", "local"]),
)
members = st.builds(
    MemberSpec,
    name=st.from_regex(r"[a-z0-9][a-z0-9_-]{0,5}", fullmatch=True),
    backbone=st.sampled_from(["sface", "iresnet"]),
    options=st.dictionaries(st.sampled_from(["depth", "width"]), st.integers(1, 100)),
    trainable=st.sampled_from(["none", "neck", "last-stage", "all"]),
    training=training,
)
ensembles = st.builds(
    EnsembleSpec,
    members=st.lists(members, min_size=1, max_size=2, unique_by=lambda m: m.name).map(tuple),
    seed=st.integers(0, 2**40),
)
jobs = (
    st.builds(
        TrainingJob,
        ensemble=ensembles,
        rounds=st.integers(1, 10_000),
        max_images_per_site=st.integers(2, 10**6),
        max_update_norm=st.floats(0.001, 1e6),
        scope=st.sampled_from(["all", "encoder"]),
        rule=st.sampled_from(["mean", "class-weighted"]),
        reveal_aggregate_to=st.sampled_from(["server", "sites"]),
        threat_model=st.sampled_from(["malicious", "honest-but-curious"]),
        server_optimiser=st.sampled_from(["sgd", "adam"]),
        server_learning_rate=st.floats(1e-6, 1e6),
        server_momentum=st.floats(0, 1, exclude_max=True),
        resume_from=st.from_regex(r"[A-Za-z0-9-]{0,64}", fullmatch=True),
        **common,
    )
    | st.builds(
        MatchingJob,
        ensemble=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
        strategy=st.sampled_from(["isometry", "another"]),
        released_rows=st.integers(0, 500),
        yardstick_subjects=st.integers(0, 999),
        hpo_weight=st.floats(0, 1),
        keep_gram=st.booleans(),
        **common,
    )
    | st.builds(
        DiscoveryJob,
        ensemble=st.from_regex(r"[0-9a-f]{64}", fullmatch=True),
        level=st.floats(0.001, 1),
        search_level=st.floats(0.001, 1),
        **common,
    )
)


@pytest.fixture(params=JOBS, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A rendered folder of each default job."""
    render_job(JOBS[request.param](), tmp_path / "job")
    return tmp_path / "job"


def load(folder: Path, file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / file).read_text())
    return content


def change(folder: Path, file: str, edit: Callable[[dict[str, Any]], object]) -> None:
    content = load(folder, file)
    edit(content)
    (folder / file).write_text(json.dumps(content))


def components(folder: Path) -> Iterator[dict[str, Any]]:
    server, client = load(folder, SERVER), load(folder, CLIENT)
    yield from server["workflows"]
    yield from server["components"]
    yield from client["components"]
    yield from (item["executor"] for item in client["executors"])


# --- there and back ------------------------------------------------------------------------------


@given(job=jobs)
@settings(max_examples=40, deadline=None)
def test_a_job_survives_its_folder(job: JobSpec) -> None:
    with tempfile.TemporaryDirectory() as place:
        render_job(job, Path(place) / "job")
        assert read_job(Path(place) / "job") == job


@given(job=jobs, count=st.integers(4, 12))
@settings(max_examples=20, deadline=None)
def test_all_named_sites_are_needed_whatever_the_minimum(job: JobSpec, count: int) -> None:
    names = tuple(f"site-{number}" for number in range(count))
    job = job.model_copy(update={"sites": names, "minimum_sites": 3})
    with tempfile.TemporaryDirectory() as place:
        first, second = Path(place) / "first", Path(place) / "second"
        render_job(job, first)
        assert load(first, "meta.json")["min_clients"] == count
        assert load(first, "meta.json")["deploy_map"] == {"app": ["server", *names]}
        render_job(read_job(first), second)
        assert [load(first, file) for file in FILES] == [load(second, file) for file in FILES]


def aggregator(folder: Path) -> dict[str, Any]:
    (found,) = (c for c in load(folder, SERVER)["components"] if c["id"] == "aggregator")
    return dict(found)


def test_how_a_job_aggregates_is_said_to_the_aggregator_alone(tmp_path: Path) -> None:
    said = {
        "scope": "encoder",
        "rule": "class-weighted",
        "reveal_aggregate_to": "sites",
        "threat_model": "honest-but-curious",
        "server_optimiser": "adam",
        "server_learning_rate": 0.01,
        "server_momentum": 0.5,
    }
    render_job(TrainingJob(**said), tmp_path / "job")
    assert aggregator(tmp_path / "job")["args"] == said
    (workflow,) = load(tmp_path / "job", SERVER)["workflows"]
    assert not workflow["args"].keys() & said.keys()
    assert workflow["args"]["aggregator_id"] == "aggregator"


def test_a_training_needs_fewer_sites_than_it_begins_with(tmp_path: Path) -> None:
    job = TrainingJob(sites=("berlin", "bonn", "leuven", "ulm"), minimum_sites=3)
    render_job(job, tmp_path / "job")
    assert load(tmp_path / "job", "meta.json")["min_clients"] == 4
    (workflow,) = load(tmp_path / "job", SERVER)["workflows"]
    assert workflow["args"]["minimum_sites"] == 3
    assert read_job(tmp_path / "job") == job


def test_a_job_goes_on_from_the_one_that_it_names(tmp_path: Path) -> None:
    job = TrainingJob(resume_from="0b1c2d3e-4f50-6172-8394-a5b6c7d8e9f0", rounds=9)
    render_job(job, tmp_path / "job")
    (workflow,) = load(tmp_path / "job", SERVER)["workflows"]
    assert workflow["args"]["resume_from"] == job.resume_from
    assert read_job(tmp_path / "job") == job


def test_a_job_for_nobody_in_particular_goes_to_all(folder: Path) -> None:
    assert load(folder, "meta.json")["deploy_map"] == {"app": ["@ALL"]}


def test_the_name_in_the_folder_is_the_templates_unless_another_is_given(tmp_path: Path) -> None:
    render_job(MatchingJob(), tmp_path / "a")
    render_job(MatchingJob(), tmp_path / "b", name="march")
    assert load(tmp_path / "a", "meta.json")["name"] == "match"
    assert load(tmp_path / "b", "meta.json")["name"] == "march"
    assert read_job(tmp_path / "b") == MatchingJob()


@pytest.mark.parametrize("template", JOBS)
def test_the_templates_are_what_the_defaults_render(template: str, folder: Path) -> None:
    render_job(JOBS[template](), folder / "again")
    for file in FILES:
        kept = (template_folder() / template / file).read_text(encoding="utf-8")
        assert kept == (folder / "again" / file).read_text(encoding="utf-8"), file


def test_every_template_has_a_folder_with_a_readme_and_every_folder_a_template() -> None:
    folders = {path.name for path in template_folder().iterdir() if path.is_dir()}
    assert folders == set(JOBS)
    for name in folders:
        assert (template_folder() / name / "README.md").read_text().strip()


# --- what FLARE reads ----------------------------------------------------------------------------


def test_every_component_is_ours_or_allowed_by_flare_and_can_be_imported(folder: Path) -> None:
    found = list(components(folder))
    assert len(found) >= 2
    for component in found:
        module, _, name = component["path"].rpartition(".")
        ours = module.startswith("fedgestalt.")
        assert ours or component["path"] in DEFAULT_CLASS_ALLOW_LIST
        assert isinstance(getattr(importlib.import_module(module), name), type)


def test_components_are_named_by_path_alone(folder: Path) -> None:
    for component in components(folder):
        assert component.keys() <= {"id", "path", "args"}


def test_flare_can_build_what_the_folder_names(folder: Path) -> None:
    bases = {"workflows": Controller, "executors": Executor}
    for file, key in ((SERVER, "workflows"), (CLIENT, "executors")):
        (item,) = load(folder, file)[key]
        assert isinstance(built(item.get("executor", item)), bases[key])


def built(component: Mapping[str, Any]) -> object:
    module, _, name = component["path"].rpartition(".")
    return getattr(importlib.import_module(module), name)(**component["args"])


@given(job=jobs.filter(lambda job: isinstance(job, TrainingJob)))
@settings(max_examples=20, deadline=None)
def test_flare_can_build_the_aggregator_of_every_training(job: JobSpec) -> None:
    with tempfile.TemporaryDirectory() as place:
        render_job(job, Path(place) / "job")
        made = built(aggregator(Path(place) / "job"))
    assert isinstance(made, Aggregator)
    assert isinstance(made, ZeroSumMaskAggregator)
    assert isinstance(job, TrainingJob)
    chosen = made.aggregation(job.max_images_per_site)
    assert (chosen.scope, chosen.rule) == (job.scope, job.rule)
    assert (chosen.recipient, chosen.threat_model) == (job.reveal_aggregate_to, job.threat_model)
    assert chosen.max_weight == job.max_images_per_site
    step = chosen.step
    assert (step.optimiser, step.momentum) == (job.server_optimiser, job.server_momentum)
    assert step.learning_rate == job.server_learning_rate


def test_a_job_says_nothing_of_a_sites_folders(folder: Path) -> None:
    said = "".join((folder / file).read_text() for file in FILES)
    assert '"data"' not in said
    assert '"store"' not in said


# --- settings ------------------------------------------------------------------------------------


def test_settings_are_yaml_values_under_dotted_keys() -> None:
    job = with_settings(
        TrainingJob(),
        {
            "rounds": "10",
            "sites": "[bonn, ulm, kiel]",
            "phase_limit_seconds": "1.5e+2",
            "ensemble.seed": "7",
            "ensemble.members.0.training.epochs": "3",
            "ensemble.members.1.options": "{depth: 18, width: 4}",
            "ensemble.members.1.options.embedding_size": "8",
        },
    )
    assert (job.rounds, job.sites, job.phase_limit_seconds) == (10, ("bonn", "ulm", "kiel"), 150.0)
    assert job.ensemble.seed == 7
    assert job.ensemble.members[0].training.epochs == 3
    assert job.ensemble.members[1].options == {"depth": 18, "width": 4, "embedding_size": 8}


def test_a_whole_item_of_a_list_can_be_set() -> None:
    member = "{name: tiny, backbone: iresnet, trainable: all}"
    job = with_settings(TrainingJob(), {"ensemble.members.0": member})
    assert job.ensemble.members[0] == MemberSpec(name="tiny", backbone="iresnet", trainable="all")
    assert job.ensemble.members[1:] == TrainingJob().ensemble.members[1:]


def test_a_preset_is_the_published_ensemble_and_can_be_changed_in_any_order() -> None:
    changes = {"ensemble.members.1.training.epochs": "7", "preset": "gestaltmatcher"}
    job = with_settings(TrainingJob(), changes)
    assert (job.rounds, job.rounds * job.ensemble.members[0].training.epochs) == (10, 50)
    m0, m1, m2 = job.ensemble.members
    assert (m0.name, m0.trainable, m0.options["weights"]) == ("m0", "neck", "glint360k_r50.onnx")
    assert (m1.name, m1.trainable, m1.options["weights"]) == ("m1", "neck", "glint360k_r100.onnx")
    assert (m2.trainable, m2.options) == ("none", m1.options)
    one, other = m0.training, m1.training
    assert (one.batch_size, one.learning_rate, one.head_learning_rate) == (64, 5e-4, 1e-3)
    assert (one.weight_decay, one.head_weight_decay, one.dropout) == (5e-5, 5e-4, 0.5)
    assert (other.batch_size, other.learning_rate, other.head_learning_rate) == (128, 1e-3, 1e-3)
    assert (other.weight_decay, other.head_weight_decay, other.epochs) == (0, 5e-4, 7)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_names_installed_plugins_and_survives_its_folder(
    name: str, tmp_path: Path
) -> None:
    job = with_settings(TrainingJob(), {"preset": name})
    check_plugins(job, get_registry())
    render_job(job, tmp_path / "job")
    assert read_job(tmp_path / "job") == job
    guide = template_folder().parent / "docs/how-to/choose-what-trains.md"
    assert f"`preset={name}`" in guide.read_text()


def test_weights_for_research_alone_are_used_by_no_site_that_does_not_say_so() -> None:
    job = with_settings(TrainingJob(), {"preset": "gestaltmatcher"})
    licences = {m.name: m.options["weights_licence"] for m in job.ensemble.members}
    settings = SiteSettings(data="d", store="s")
    with pytest.raises(SiteError, match="may not use weights under LicenseRef-InsightFace"):
        settings.check_licences(licences)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'gestaltmatcher'"):
        with_settings(TrainingJob(), {"preset": "gestaltmacher"})


def test_a_matching_job_has_no_preset() -> None:
    with pytest.raises(ConfigError, match="unknown key 'preset'"):
        with_settings(MatchingJob(), {"preset": "gestaltmatcher"})


@pytest.mark.parametrize("weights", ["/srv/models/net.onnx", "../net.onnx", "a/b.onnx", ".net", ""])
def test_a_job_names_weights_by_no_path(weights: str) -> None:
    options = {"weights": weights}
    member = MemberSpec(name="a", backbone="arcface-onnx", options=options)
    job = TrainingJob(ensemble=EnsembleSpec(members=(member,)))
    with pytest.raises(ConfigError, match="is not the name of a file; name the file alone"):
        check_plugins(job, get_registry())


def test_no_settings_change_nothing() -> None:
    assert with_settings(MatchingJob(), {}) == MatchingJob()


def test_the_job_that_was_given_stays() -> None:
    job = TrainingJob()
    with_settings(job, {"ensemble.members.0.options.dropout": "0.5"})
    assert job == TrainingJob()


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("round", "did you mean 'rounds'"),
        ("ensembel.seed", "did you mean 'ensemble'"),
        ("ensemble.membres.0.name", "did you mean 'members'"),
        ("ensemble.members.0.trainig.epochs", "did you mean 'training'"),
        ("ensemble.sede", "did you mean 'seed'"),
        ("ensemble.members.0.training.epoch", "did you mean 'epochs'"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(key: str, advice: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as fault:
        with_settings(TrainingJob(), {key: "1"})
    assert advice in fault.value.remedy


def test_members_that_are_named_anew_can_be_set_further() -> None:
    job = with_settings(
        TrainingJob(),
        {
            "ensemble.members": "[{name: a, backbone: sface}, {name: b}]",
            "ensemble.members.1.backbone": "sface",
        },
    )
    assert [member.backbone for member in job.ensemble.members] == ["sface", "sface"]
    further = with_settings(
        job,
        {
            "ensemble.members": "[{name: c, backbone: sface}]",
            "ensemble.members.0.training.epochs": "9",
        },
    )
    (member,) = further.ensemble.members
    assert member.training == TrainingSpec(epochs=9)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rounds", "0"),
        ("rounds", "many"),
        ("rounds", "[1"),
        ("rounds", "!!python/object:os.system {}"),
        ("rounds.of", "1"),
        ("rounds.of.beer", "1"),
        ("minimum_sites", "2"),
        ("scope", "classifiers"),
        ("rule", "median"),
        ("reveal_aggregate_to", "nobody"),
        ("threat_model", "angelic"),
        ("server_optimiser", "adagrad"),
        ("server_learning_rate", "0"),
        ("server_learning_rate", ".inf"),
        ("server_momentum", "1.0"),
        ("server_momentum", "-0.1"),
        ("server_momentum", ".nan"),
        ("ensemble.members.0.training.proximal", "-1"),
        ("ensemble.members.0.training.softmax", "some"),
        ("ensemble.members.0.training.batch_norm", "global"),
        ("ensemble.members.0.training.optimiser", "adagrad"),
        ("resume_from", "../x"),
        ("resume_from", "a b"),
        ("resume_from", "5"),
        ("resume_from", '"job\\n"'),
        ("resume_from", "a" * 65),
        ("phase_limit_seconds", "0"),
        ("ensemble", "all of them"),
        ("ensemble.members", "[]"),
        ("ensemble.members.9.name", "x"),
        ("ensemble.members.9", "{}"),
        ("ensemble.members.-1", "{}"),
        ("ensemble.members.first", "{}"),
        ("ensemble.members.²", "{}"),
        ("ensemble.members.².name", "x"),
        ("ensemble.members.1.name", "fine-tuned"),
        ("sites.0", "bonn"),
        ("", "1"),
        (".", "1"),
        ("ensemble.", "1"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match="settings of job train_ensemble"):
        with_settings(TrainingJob(), {key: value})


keys = st.lists(
    st.sampled_from(["ensemble", "members", "0", "1", "rounds", "sites", "training"]) | st.text(),
    min_size=1,
    max_size=4,
).map(".".join)


@given(key=keys, value=st.text())
@settings(deadline=None)
def test_arbitrary_settings_give_a_job_or_a_config_error(key: str, value: str) -> None:
    try:
        job = with_settings(TrainingJob(), {key: value})
    except ConfigError as fault:
        assert fault.where == "settings of job train_ensemble"  # noqa: PT017  either is right
    else:
        assert TrainingJob.model_validate(job.model_dump()) == job


def test_an_unknown_template_names_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="'train_ensembel'; did you mean 'train_ensemble'"):
        job_class("train_ensembel")


@pytest.mark.parametrize("digest", ["abc", DIGEST.upper(), DIGEST + "0", f"{DIGEST}\n"])
def test_what_is_no_digest_names_no_ensemble(digest: str) -> None:
    with pytest.raises(ValueError, match="ensemble"):
        MatchingJob(ensemble=digest)


# --- refusals ------------------------------------------------------------------------------------


def test_an_existing_folder_is_never_written_into(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        render_job(MatchingJob(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        render_job(MatchingJob(), tmp_path / "file" / "job")


@pytest.mark.parametrize("path", ["os.system", "app.custom.Workflow", "", None, ["list"], {}])
def test_a_workflow_of_somebody_else_is_refused(folder: Path, path: object) -> None:
    change(folder, SERVER, lambda server: server["workflows"][0].update(path=path))
    with pytest.raises(ConfigError, match="is no job of this project"):
        read_job(folder)


@pytest.mark.parametrize(
    "path", ["os.system", "custom.Spy", "fedgestalt.federation.job.executor.Other"]
)
def test_another_executor_is_refused(folder: Path, path: str) -> None:
    change(folder, CLIENT, lambda client: client["executors"][0]["executor"].update(path=path))
    with pytest.raises(ConfigError, match="executors differs"):
        read_job(folder)


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        (CLIENT, lambda c: c["components"].append({"id": "spy", "path": "custom.Spy"})),
        (CLIENT, lambda c: c["task_result_filters"].append({"filters": []})),
        (CLIENT, lambda c: c["executors"].append(c["executors"][0])),
        (CLIENT, lambda c: c.update(extra=1)),
        (SERVER, lambda c: c["components"].append({"id": "spy", "path": "custom.Spy"})),
        (SERVER, lambda c: c["components"].append("spy")),
        (SERVER, lambda c: c["components"].append({"id": "spy", "args": 5})),
        (SERVER, lambda c: c["workflows"].append(c["workflows"][0])),
        (SERVER, lambda c: c.update(extra=1)),
        ("meta.json", lambda c: c.update(byoc=True)),
        ("meta.json", lambda c: c["deploy_map"].update(spy=["@ALL"])),
        ("meta.json", lambda c: c.pop("notice")),
    ],
)
def test_a_folder_that_says_more_or_less_than_the_job_is_refused(
    folder: Path, file: str, edit: Callable[[dict[str, Any]], object]
) -> None:
    change(folder, file, edit)
    with pytest.raises(ConfigError, match="differs") as fault:
        read_job(folder)
    assert fault.value.where.endswith(file)
    assert "render the job again" in fault.value.remedy


def test_server_and_sites_must_be_told_the_same_ensemble(tmp_path: Path) -> None:
    render_job(TrainingJob(), tmp_path / "job")
    change(
        tmp_path / "job",
        CLIENT,
        lambda c: c["executors"][0]["executor"]["args"]["ensemble"].update(seed=99),
    )
    with pytest.raises(ConfigError, match="executors differs"):
        read_job(tmp_path / "job")


def test_an_unknown_key_in_a_folder_names_the_nearest_known_one(folder: Path) -> None:
    change(folder, SERVER, lambda s: s["workflows"][0]["args"].update(phase_limit_second=1))
    with pytest.raises(ConfigError, match="did you mean 'phase_limit_seconds'"):
        read_job(folder)


@pytest.mark.parametrize("minimum", [2, 0, "three", None, []])
def test_fewer_than_three_sites_are_refused(folder: Path, minimum: object) -> None:
    change(folder, "meta.json", lambda meta: meta.update(min_clients=minimum))
    with pytest.raises(ConfigError, match=r"minimum_sites|min_clients differs"):
        read_job(folder)


@pytest.mark.parametrize("minimum", [2, 0, "three", None, []])
def test_no_sum_of_fewer_than_three_sites_is_asked_for(tmp_path: Path, minimum: object) -> None:
    render_job(TrainingJob(), tmp_path / "job")
    change(
        tmp_path / "job",
        SERVER,
        lambda server: server["workflows"][0]["args"].update(minimum_sites=minimum),
    )
    with pytest.raises(ConfigError, match="minimum_sites"):
        read_job(tmp_path / "job")


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda a: a["args"].update(scope="some"), "scope"),
        (lambda a: a["args"].update(rules="mean"), "did you mean 'rule'"),
        (lambda a: a["args"].update(threat_model=None), "threat_model"),
        (lambda a: a["args"].update(rounds=99), "components, workflows differs"),
        (lambda a: a["args"].pop("rule"), "components differs"),
        (lambda a: a.update(args=None), "components differs"),
        (lambda a: a.update(id="other"), "components differs"),
        (lambda a: a.update(path="custom.Aggregator"), "components differs"),
    ],
)
def test_an_aggregator_that_was_told_something_else_is_refused(
    tmp_path: Path, edit: Callable[[dict[str, Any]], object], says: str
) -> None:
    render_job(TrainingJob(), tmp_path / "job")
    change(tmp_path / "job", SERVER, lambda server: edit(server["components"][0]))
    with pytest.raises(ConfigError, match=says):
        read_job(tmp_path / "job")


@pytest.mark.parametrize("components", [None, 5, "x", {}, [], [[]]])
def test_components_of_another_shape_are_refused(tmp_path: Path, components: object) -> None:
    render_job(TrainingJob(), tmp_path / "job")
    change(tmp_path / "job", SERVER, lambda server: server.update(components=components))
    with pytest.raises(ConfigError, match="components differs"):
        read_job(tmp_path / "job")


def test_another_aggregator_in_the_workflow_is_refused(tmp_path: Path) -> None:
    render_job(TrainingJob(), tmp_path / "job")
    change(
        tmp_path / "job",
        SERVER,
        lambda server: server["workflows"][0]["args"].update(aggregator_id="metrics"),
    )
    with pytest.raises(ConfigError, match="workflows differs"):
        read_job(tmp_path / "job")


@pytest.mark.parametrize("workflows", [5, "x", {}, {"id": 1}, ["x"], [[]], [None], None, []])
def test_workflows_of_another_shape_are_refused(folder: Path, workflows: object) -> None:
    change(folder, SERVER, lambda server: server.update(workflows=workflows))
    with pytest.raises(ConfigError, match="is no job of this project"):
        read_job(folder)


@pytest.mark.parametrize("arguments", [5, "x", ["x"], None])
def test_arguments_of_another_shape_are_refused(folder: Path, arguments: object) -> None:
    change(folder, SERVER, lambda server: server["workflows"][0].update(args=arguments))
    with pytest.raises(ConfigError, match=SERVER):
        read_job(folder)


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_is_named(folder: Path, file: str) -> None:
    (folder / file).unlink()
    with pytest.raises(ConfigError, match=f"{file}: is missing"):
        read_job(folder)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize(
    ("content", "says"), [(b"{", "JSON"), (b"\xff", "JSON"), (b"[]", "object")]
)
def test_a_file_that_is_no_json_object_is_named(
    folder: Path, file: str, content: bytes, says: str
) -> None:
    (folder / file).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{file}: is not .*{says}"):
        read_job(folder)


@pytest.mark.parametrize(
    ("template", "settings", "says"),
    [
        ("train_ensemble", {"ensemble.members.0.backbone": "sfase"}, "did you mean 'sface'"),
        ("train_ensemble", {"ensemble.members.0.options": "{dropoot: 1}"}, "'dropout'"),
        ("match", {"strategy": "isometri"}, "did you mean 'isometry'"),
        ("discover", {"strategy": "secret-shared"}, "here the server compares alone"),
    ],
)
def test_a_job_that_names_what_is_not_installed_is_refused_before_it_is_rendered(
    template: str, settings: dict[str, str], says: str
) -> None:
    job = with_settings(job_class(template)(), settings)
    with pytest.raises(FedgestaltError, match=says):
        check_plugins(job, get_registry())


@pytest.mark.parametrize("job", list(JOBS.values()))
def test_the_default_jobs_name_installed_plugins_only(job: type[JobSpec]) -> None:
    check_plugins(job(), get_registry())
