"""Built cohorts on disk."""

import os
import shutil
import threading
import time
from pathlib import Path

import pytest

from fedgestalt.cohort import default_cache, materialise, read_cohort
from fedgestalt.errors import ConfigError, DataError, PluginError


class Source:
    """A cohort that is a copy of a folder."""

    name, version = "copied", "v1"
    summary, licence, has_patients = "a copy", "CC0-1.0", False

    def __init__(self, origin, before=lambda target: None):
        self.origin, self.before, self.builds = origin, before, 0

    def build(self, target, progress):
        self.builds += 1
        assert list(target.iterdir()) == []
        self.before(target)
        shutil.copytree(self.origin, target, dirs_exist_ok=True)
        progress(1, 1)


def silent(done, total):
    pass


def test_a_cohort_is_built_once_and_found_again(folder, tmp_path):
    source, cache = Source(folder), tmp_path / "cache"
    place = materialise(source, cache, silent)
    assert place == cache / "copied-v1"
    assert read_cohort(place).digest == read_cohort(folder).digest
    assert materialise(source, cache, silent) == place
    assert source.builds == 1
    assert [path.name for path in cache.iterdir()] == ["copied-v1"]


def test_another_version_is_built_anew(folder, tmp_path):
    source = Source(folder)
    materialise(source, tmp_path / "cache", silent)
    source.version = "v2"
    assert materialise(source, tmp_path / "cache", silent).name == "copied-v2"
    assert source.builds == 2


def test_progress_is_passed_on(folder, tmp_path):
    seen = []
    materialise(Source(folder), tmp_path / "cache", lambda *step: seen.append(step))
    assert seen == [(1, 1)]


def test_an_interrupted_build_leaves_nothing_and_is_repeated(folder, tmp_path):
    def fail(target):
        (target / "half").write_text("")
        raise KeyboardInterrupt

    cache = tmp_path / "cache"
    with pytest.raises(KeyboardInterrupt):
        materialise(Source(folder, fail), cache, silent)
    assert list(cache.iterdir()) == []
    assert materialise(Source(folder), cache, silent).is_dir()


def test_of_two_builds_at_once_one_stays_and_both_are_told_where(folder, tmp_path):
    meet = threading.Barrier(2, timeout=20)
    sources = [Source(folder, lambda target: meet.wait()) for _ in range(2)]
    cache, places = tmp_path / "cache", []

    def build(source):
        places.append(materialise(source, cache, silent))

    threads = [threading.Thread(target=build, args=[source]) for source in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [source.builds for source in sources] == [1, 1]
    assert places == [cache / "copied-v1"] * 2
    assert [path.name for path in cache.iterdir()] == ["copied-v1"]
    assert read_cohort(places[0]).digest == read_cohort(folder).digest


def test_leftovers_are_removed_after_a_day_and_not_before(folder, tmp_path):
    cache = tmp_path / "cache"
    for name, hours in ((".building-old", 25), (".building-fresh", 1), ("other-v1", 99)):
        (cache / name / "gmdb_align").mkdir(parents=True)
        then = time.time() - hours * 3600
        os.utime(cache / name, (then, then))
    materialise(Source(folder), cache, silent)
    kept = sorted(path.name for path in cache.iterdir())
    assert kept == [".building-fresh", "copied-v1", "other-v1"]


def test_a_cohort_that_breaks_the_rules_is_not_kept(folder, tmp_path):
    (folder / "gmdb_align" / "1_rot_aligned.jpg").unlink()
    with pytest.raises(PluginError) as caught:
        materialise(Source(folder), tmp_path / "cache", silent)
    assert str(caught.value) == (
        "cohort 'copied' was built with a fault: gmdb_metadata/gmdb_train_images_v1.csv, row 2: "
        "its image is not in gmdb_align; copy the image or drop the row; "
        "report it to the author of the plugin."
    )
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_fault_of_the_build_is_passed_on(folder, tmp_path):
    def fail(target):
        raise DataError("the photographs are missing")

    with pytest.raises(DataError, match="the photographs are missing"):
        materialise(Source(folder, fail), tmp_path / "cache", silent)


def test_a_version_that_is_no_folder_name_is_refused(folder, tmp_path):
    source = Source(folder)
    source.version = "../v1"
    with pytest.raises(PluginError, match="cannot be a folder name"):
        materialise(source, tmp_path / "cache", silent)


def test_a_cache_that_cannot_be_written_is_refused(folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"the cache cannot be written: .*; set FEDGESTALT_CACHE"):
        materialise(Source(folder), tmp_path / "file" / "cache", silent)


def test_a_finished_cohort_that_cannot_be_moved_is_refused(folder, tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError("no renaming here")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(ConfigError, match="cannot be moved into the cache"):
        materialise(Source(folder), tmp_path / "cache", silent)


def test_the_default_cache_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FEDGESTALT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_cache() == tmp_path / ".cache" / "fedgestalt"
    monkeypatch.setenv("XDG_CACHE_HOME", "/shared")
    assert default_cache() == Path("/shared/fedgestalt")
    monkeypatch.setenv("FEDGESTALT_CACHE", "/mine")
    assert default_cache() == Path("/mine")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def homeless():
        raise RuntimeError

    monkeypatch.delenv("FEDGESTALT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ConfigError, match="set FEDGESTALT_CACHE to a folder"):
        default_cache()
