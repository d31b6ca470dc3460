"""A site's own settings file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedgestalt.errors import ConfigError, SiteError
from fedgestalt.federation.site.settings import ALL_ROWS, FILE_NAME, SiteSettings, read_settings
from fedgestalt.hooks import get_registry
from fedgestalt.jobs import JOBS, TrainingJob
from fedgestalt.learning.ensemble import weight_licences
from fedgestalt.learning.spec import default_ensemble
from fedgestalt.secagg import Recipient, ThreatModel

SMALL = {"data": "/cohorts/{site}", "store": "/var/{site}/store"}


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path


def write(folder: Path, content: object) -> Path:
    path = folder / FILE_NAME
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return folder


def test_a_file_with_both_folders_is_enough(local: Path) -> None:
    settings = read_settings(write(local, SMALL))
    assert settings == SiteSettings(data="/cohorts/{site}", store="/var/{site}/store")


def test_defaults_are_careful(local: Path) -> None:
    settings = read_settings(write(local, SMALL))
    assert settings.minimum_sites == 3
    assert settings.minimum_survivors == 3
    assert settings.threat_model == "malicious"
    assert settings.identity == "kit"
    assert not settings.evaluation_release
    assert settings.device == "auto"
    assert settings.max_released_rows == 200
    assert not settings.reveal_hospital
    assert not settings.discovery
    assert not settings.release_hpo_terms
    assert settings.max_update_norm == 1.0
    assert not any("NC" in licence for licence in settings.weight_licences)


def test_all_settings_are_read(local: Path) -> None:
    content: dict[str, Any] = SMALL | {
        "weights": "/srv/{site}/weights",
        "label_map": "/agreed",
        "device": "cpu",
        "threads": 2,
        "processes": 3,
        "jobs": ["match"],
        "partners": ["bonn", "leuven"],
        "excluded_sites": ["berlin"],
        "minimum_sites": 5,
        "minimum_survivors": 4,
        "threat_model": "honest-but-curious",
        "reveal_aggregate_to": "sites",
        "identity": "ephemeral",
        "strategies": ["isometry"],
        "weight_licences": ["MIT"],
        "max_released_rows": 10,
        "evaluation_release": True,
        "max_queries_per_job": 7,
        "max_queries_per_day": 9,
        "minimum_images_per_syndrome": 2,
        "reveal_hospital": True,
        "discovery": True,
        "release_hpo_terms": True,
        "max_update_norm": 2.5,
    }
    assert content.keys() == SiteSettings.model_fields.keys()
    assert read_settings(write(local, content)).model_dump(mode="json") == content


def test_site_in_a_path_stands_for_the_name_of_the_site() -> None:
    settings = SiteSettings(
        data="/cohorts/{site}/{site}", store="/stores/x-{site}", weights="/weights/{site}"
    )
    assert settings.weights_folder("bonn") == Path("/weights/bonn")
    assert SiteSettings(data="d", store="s").weights_folder("bonn") is None
    assert settings.data_folder("bonn") == Path("/cohorts/bonn/bonn")
    assert settings.store_folder("bonn") == Path("/stores/x-bonn")


@given(site=st.from_regex(r"[a-z][a-z0-9.{}-]{0,8}", fullmatch=True))
def test_a_path_without_the_placeholder_is_the_same_for_every_site(site: str) -> None:
    settings = SiteSettings(data="/data/{cohort}", store="/stores/{site}")
    assert settings.data_folder(site) == Path("/data/{cohort}")
    assert settings.store_folder(site) == Path("/stores") / site


def test_a_missing_file_says_what_to_write(local: Path) -> None:
    with pytest.raises(ConfigError, match=f"this site has no {FILE_NAME}") as fault:
        read_settings(local)
    assert fault.value.where == str(local)
    assert "data and store" in fault.value.remedy


def test_a_missing_folder_is_named(local: Path) -> None:
    with pytest.raises(ConfigError, match="store"):
        read_settings(write(local, {"data": "/cohort"}))


def test_an_unknown_key_names_the_nearest_known_one(local: Path) -> None:
    with pytest.raises(ConfigError, match="'minimum_site'; did you mean 'minimum_sites'") as fault:
        read_settings(write(local, SMALL | {"minimum_site": 4}))
    assert fault.value.where == str(local / FILE_NAME)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("minimum_sites", 2),
        ("minimum_sites", "three"),
        ("minimum_survivors", 1),
        ("minimum_survivors", None),
        ("threat_model", "trusting"),
        ("threat_model", None),
        ("reveal_aggregate_to", "nobody"),
        ("identity", "none"),
        ("max_released_rows", 0),
        ("threads", 0),
        ("device", "tpu"),
        ("data", 5),
        ("evaluation_release", "perhaps"),
        ("jobs", "match"),
        ("partners", [1]),
        ("excluded_sites", "bonn"),
        ("strategies", {"isometry": True}),
        ("weight_licences", "MIT"),
        ("max_update_norm", 0),
        ("max_update_norm", -1),
    ],
)
def test_a_wrong_value_names_its_key(local: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=key):
        read_settings(write(local, SMALL | {key: value}))


@pytest.mark.parametrize("text", ["data: [", "a: b: c", "\tdata: x", "data: &a *b", "data: \x00"])
def test_what_is_no_yaml_is_refused(local: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        read_settings(write(local, text))


@pytest.mark.parametrize("text", ["", "just words", "- data\n- store", "5", "null"])
def test_what_is_no_mapping_is_refused(local: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="is not a YAML mapping"):
        read_settings(write(local, text))


def test_keys_that_are_no_text_are_refused(local: Path) -> None:
    with pytest.raises(ConfigError, match=FILE_NAME):
        read_settings(write(local, SMALL | {7: "seven"}))  # type: ignore[dict-item]


def test_a_file_that_is_not_utf_8_is_refused(local: Path) -> None:
    (local / FILE_NAME).write_bytes("data: /Köln\nstore: /var\n".encode("latin-1"))
    with pytest.raises(ConfigError, match=FILE_NAME):
        read_settings(local)


def test_yaml_cannot_make_python_objects(local: Path) -> None:
    with pytest.raises(ConfigError, match="is not YAML"):
        read_settings(write(local, "data: !!python/object/apply:os.getcwd []\nstore: x\n"))


# --- policy --------------------------------------------------------------------------------------


def policy(**changes: Any) -> SiteSettings:
    return SiteSettings(**SMALL, **changes)


def refusal(fault: pytest.ExceptionInfo[SiteError], key: str) -> str:
    """What a site says; the remedy always names the key and its file."""
    assert (
        fault.value.remedy == f"change the job, or ask the site to change {key} in its {FILE_NAME}"
    )
    return fault.value.what


@pytest.mark.parametrize("template", JOBS)
def test_a_site_takes_part_in_every_kind_of_job_unless_it_says_otherwise(template: str) -> None:
    policy(discovery=True).check_job(template)


def test_unsolved_cases_are_compared_only_where_a_site_says_so() -> None:
    with pytest.raises(SiteError) as fault:
        policy().check_job("discover")
    said = refusal(fault, "discovery")
    assert said == "this site compares no unsolved case with those of other hospitals"
    with pytest.raises(SiteError, match="does not take part in jobs of the kind"):
        policy(discovery=True, jobs=("match",)).check_job("discover")


def test_a_site_takes_part_in_no_kind_of_job_that_it_does_not_list() -> None:
    policy(jobs=("match",)).check_job("match")
    with pytest.raises(SiteError) as fault:
        policy(jobs=("match",)).check_job("train_ensemble")
    said = refusal(fault, "jobs")
    assert said == "this site does not take part in jobs of the kind 'train_ensemble'"


def test_without_a_list_any_site_is_a_partner() -> None:
    policy().check_roster("bonn", ("bonn", "ulm", "kiel"))


def test_a_site_works_with_its_partners_and_need_not_list_itself() -> None:
    policy(partners=("ulm", "kiel", "essen")).check_roster("bonn", ("bonn", "ulm", "kiel"))


def test_all_strangers_are_named() -> None:
    with pytest.raises(SiteError) as fault:
        policy(partners=("ulm",)).check_roster("bonn", ("ulm", "kiel", "bonn", "essen"))
    assert refusal(fault, "partners") == "this site does not work with essen, kiel"


def test_a_site_does_not_work_with_one_that_it_excludes() -> None:
    careful = policy(excluded_sites=("kiel", "mainz"))
    careful.check_roster("bonn", ("bonn", "ulm", "essen"))
    with pytest.raises(SiteError) as fault:
        careful.check_roster("bonn", ("bonn", "ulm", "kiel"))
    assert refusal(fault, "excluded_sites") == "this site does not work with kiel"


def test_a_partner_that_is_excluded_stays_excluded() -> None:
    with pytest.raises(SiteError) as fault:
        policy(partners=("ulm", "kiel"), excluded_sites=("kiel",)).check_roster(
            "bonn", ("bonn", "ulm", "kiel")
        )
    refusal(fault, "excluded_sites")


def test_the_default_job_asks_for_no_larger_update_than_a_site_takes() -> None:
    assert TrainingJob().max_update_norm == policy().max_update_norm


@pytest.mark.parametrize(
    "roster", [(), ("ulm", "kiel", "essen"), ("ulm", "kiel", "Bonn"), ("ulm", "kiel", "bonn2")]
)
def test_a_site_takes_no_part_in_a_job_that_does_not_name_it(roster: tuple[str, ...]) -> None:
    with pytest.raises(SiteError) as fault:
        policy(partners=("berlin",)).check_roster("bonn", roster)
    assert fault.value.what == "the job's roster does not name this site"
    assert fault.value.remedy == "submit it again"


@pytest.mark.parametrize("roster", [("bonn", "ulm"), ("bonn", "ulm", "ulm")])
def test_a_site_counts_every_site_once_and_itself(roster: tuple[str, ...]) -> None:
    with pytest.raises(SiteError) as fault:
        policy().check_roster("bonn", roster)
    said = refusal(fault, "minimum_sites")
    assert "takes part with 3 sites or more, the job has 2" in said


def test_exactly_the_fewest_sites_are_enough() -> None:
    sites = ("bonn", "ulm", "kiel", "essen")
    policy(minimum_sites=4).check_roster("bonn", sites)
    with pytest.raises(SiteError, match="with 5 sites or more, the job has 4"):
        policy(minimum_sites=5).check_roster("bonn", sites)


def test_by_default_a_site_asks_for_protection_against_a_malicious_server_alone() -> None:
    policy().check_aggregation(Recipient.SERVER, ThreatModel.MALICIOUS)
    policy().check_aggregation(Recipient.SITES, ThreatModel.MALICIOUS)
    with pytest.raises(SiteError) as fault:
        policy().check_aggregation(Recipient.SITES, ThreatModel.HONEST_BUT_CURIOUS)
    assert refusal(fault, "threat_model") == (
        "this site does not trust the server to follow the protocol, the job does"
        " (honest-but-curious)"
    )


@pytest.mark.parametrize("threat", ThreatModel)
def test_a_site_that_trusts_the_server_takes_any_job(threat: ThreatModel) -> None:
    policy(threat_model="honest-but-curious").check_aggregation(Recipient.SERVER, threat)


def test_a_site_may_keep_all_sums_from_the_server() -> None:
    careful = policy(reveal_aggregate_to="sites")
    careful.check_aggregation(Recipient.SITES, ThreatModel.MALICIOUS)
    with pytest.raises(SiteError) as fault:
        careful.check_aggregation(Recipient.SERVER, ThreatModel.MALICIOUS)
    said = refusal(fault, "reveal_aggregate_to")
    assert said == "this site lets no server learn the sum of updates"


def test_words_of_another_version_protect_nobody() -> None:
    with pytest.raises(SiteError):
        policy(reveal_aggregate_to="sites").check_aggregation("everybody", "malicious")
    with pytest.raises(SiteError):
        policy().check_aggregation("server", "angelic")


def test_the_default_job_is_one_that_a_careful_site_takes() -> None:
    job = TrainingJob()
    policy().check_aggregation(job.reveal_aggregate_to, job.threat_model)


def test_every_word_of_the_settings_is_one_that_secure_aggregation_knows() -> None:
    fields = SiteSettings.model_fields
    assert set(get_args(fields["threat_model"].annotation)) == set(ThreatModel)
    assert set(get_args(fields["reveal_aggregate_to"].annotation)) == set(Recipient)


def test_without_a_list_any_strategy_will_do() -> None:
    policy().check_strategy("anything")


def test_a_strategy_that_is_not_listed_is_refused() -> None:
    policy(strategies=("isometry",)).check_strategy("isometry")
    with pytest.raises(SiteError) as fault:
        policy(strategies=("isometry",)).check_strategy("plain")
    assert refusal(fault, "strategies") == "this site does not take part in matching by 'plain'"


@pytest.mark.parametrize("rows", [1, 200])
def test_as_many_rows_as_allowed_are_released(rows: int) -> None:
    policy().check_release(rows)


def test_one_row_more_is_refused() -> None:
    with pytest.raises(SiteError) as fault:
        policy().check_release(201)
    said = refusal(fault, "max_released_rows")
    assert said == "this site releases 200 rows per query, the job asks for 201"


def test_an_evaluation_needs_the_sites_word() -> None:
    policy(evaluation_release=True, max_released_rows=1).check_release(ALL_ROWS)
    with pytest.raises(SiteError) as fault:
        policy().check_release(ALL_ROWS)
    assert "releases no scores of all images" in refusal(fault, "evaluation_release")


def test_consent_to_evaluations_does_not_raise_the_cap_of_other_jobs() -> None:
    with pytest.raises(SiteError, match="releases 200 rows per query"):
        policy(evaluation_release=True).check_release(201)


def test_random_weights_need_no_licence() -> None:
    policy(weight_licences=()).check_licences({"scratch": "", "other": ""})


def test_weights_under_a_licence_that_is_not_listed_are_refused_with_their_member() -> None:
    licences = {"scratch": "", "original": "MIT", "arcface": "CC-BY-NC-4.0"}
    policy(weight_licences=("MIT", "CC-BY-NC-4.0")).check_licences(licences)
    with pytest.raises(SiteError) as fault:
        policy().check_licences(licences)
    said = refusal(fault, "weight_licences")
    assert said == "this site may not use weights under CC-BY-NC-4.0 (ensemble member 'arcface')"


def test_the_weights_of_the_default_job_may_be_used_by_default() -> None:
    policy().check_licences(weight_licences(default_ensemble(), get_registry()))


def test_without_any_licence_the_default_job_is_refused() -> None:
    with pytest.raises(SiteError, match=r"may not use weights under Apache-2\.0"):
        policy(weight_licences=()).check_licences(
            weight_licences(default_ensemble(), get_registry())
        )
