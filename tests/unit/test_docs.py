"""Documents say what the code does: hooks, commands, templates, dependencies, the notice."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import click
import pytest

from fedgestalt import RESEARCH_USE_ONLY
from fedgestalt.cli import main
from fedgestalt.hooks import specs
from fedgestalt.jobs import JOBS

ROOT = Path(__file__).parents[2]
HOOKS = [name for name in vars(specs) if name.startswith("fedgestalt_")]


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


def test_every_template_has_a_guide() -> None:
    assert {p.name for p in (ROOT / "job_templates").iterdir()} == set(JOBS)
    for name in JOBS:
        assert f"job render {name}" in (ROOT / "job_templates" / name / "README.md").read_text()


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/explanation/what-each-party-learns.md",
        "job_templates/train_ensemble/README.md",
        "job_templates/match/README.md",
        "provisioning/README.md",
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
