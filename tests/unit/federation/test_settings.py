"""A site's own settings file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fedgestalt.errors import ConfigError
from fedgestalt.federation.settings import FILE_NAME, SiteSettings, read_settings

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
    assert not settings.evaluation_release
    assert settings.device == "auto"


def test_all_settings_are_read(local: Path) -> None:
    content: dict[str, Any] = SMALL | {
        "device": "cpu",
        "threads": 2,
        "minimum_sites": 5,
        "max_released_rows": 10,
        "evaluation_release": True,
    }
    assert read_settings(write(local, content)).model_dump() == content


def test_site_in_a_path_stands_for_the_name_of_the_site() -> None:
    settings = SiteSettings(data="/cohorts/{site}/{site}", store="/stores/x-{site}")
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
        ("max_released_rows", 0),
        ("threads", 0),
        ("device", "tpu"),
        ("data", 5),
        ("evaluation_release", "perhaps"),
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
