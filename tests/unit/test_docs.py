"""Documents say what the code does: hooks, commands, templates, dependencies, the notice."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import click
import pytest
import yaml

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.cli import main
from fedgestalt.federation.site.settings import SiteSettings
from fedgestalt.hooks import specs
from fedgestalt.jobs import JOBS

ROOT = Path(__file__).parents[2]
HOOKS = [name for name in vars(specs) if name.startswith("fedgestalt_")]


def _for_users(document: Path) -> bool:
    """Whether people outside the project's development read it."""
    developers = {"dependencies.md", "write-a-plugin.md"}
    return document.parent.name != "adr" and document.name not in developers


@pytest.mark.parametrize("hook", HOOKS)
def test_every_hook_is_documented_with_its_exact_arguments(hook: str) -> None:
    arguments = ", ".join(inspect.signature(getattr(specs, hook)).parameters)
    guide = (ROOT / "docs/how-to/write-a-plugin.md").read_text()
    assert f"`{hook}({arguments})`" in guide


def test_every_command_of_the_readme_exists() -> None:
    text = (ROOT / "README.md").read_text()
    block = next(b for b in text.split("```") if "fedgestalt cohort build" in b)
    named = set()
    for line in block.strip().splitlines():
        _, first, *rest = line.split()
        command = main.commands[first]
        named.add(first)
        if isinstance(command, click.Group):
            words = {part.split()[0] for part in " ".join(rest).split("| ")}
            assert words == set(command.commands)
    assert named == set(main.commands) - {"version"}


def test_the_site_policy_is_documented_key_by_key() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (.+?) \| (.+) \|$", _text("docs/reference/site-policy.md"), re.M
    )
    documented = {key: (default, meaning) for key, default, meaning in rows}
    assert list(documented) == list(SiteSettings.model_fields)
    for key, field in SiteSettings.model_fields.items():
        default, meaning = documented[key]
        if field.is_required():
            assert default == "required", key
        else:
            value = list(field.default) if isinstance(field.default, tuple) else field.default
            assert yaml.safe_load(default.strip("`")) == value, key
        if field.description:
            assert meaning == field.description, key


def test_the_example_of_the_site_policy_is_valid() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", _text("docs/reference/site-policy.md"), re.S)
    assert SiteSettings(**yaml.safe_load(example)).minimum_sites == 4


def _text(document: str) -> str:
    return (ROOT / document).read_text()


def test_every_template_has_a_guide() -> None:
    assert {p.name for p in (ROOT / "job_templates").iterdir()} == set(JOBS)
    for name in JOBS:
        assert f"job render {name}" in (ROOT / "job_templates" / name / "README.md").read_text()


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md")) if _for_users(p)),
        *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "job_templates").rglob("*.md"))),
        *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "provisioning").rglob("*.md"))),
    ],
)
def test_the_notice_stands_on_what_a_person_reads(document: str) -> None:
    text = " ".join((ROOT / document).read_text().split())
    assert RESEARCH_USE_ONLY in text


def test_links_of_the_documents_lead_somewhere() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), (document, target)


def test_every_dependency_has_a_reason_and_a_pin() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    block = project[project.index("dependencies = [") : project.index("[project.optional")]
    names = re.findall(r'"([a-z-]+)[><=]', block)
    reasons = (ROOT / "docs/explanation/dependencies.md").read_text()
    pins = (ROOT / "constraints.txt").read_text().lower()
    assert len(names) > 10
    for name in names:
        assert name in reasons, name
        assert re.search(rf"^{name}==", pins, re.MULTILINE), name
