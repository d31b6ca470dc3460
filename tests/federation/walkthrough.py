"""Runs the commands of a document, as a reader would type them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

CONSOLE = re.compile(r"^```console\n(.*?)^```", re.M | re.S)


def shell_script(document: Path, replacements: Mapping[str, str] | None = None) -> str:
    """All commands of a document's console blocks as one Bash script.

    ``$ command`` is a command of the shell; ``> line`` that follows is typed into that command.

    Args:
        document: in Markdown.
        replacements: texts that the reader would choose otherwise; each must occur.
    """
    text = "\n".join(CONSOLE.findall(document.read_text(encoding="utf-8")))
    for old, new in (replacements or {}).items():
        if old not in text:
            message = f"{document.name} has no {old!r} to replace"
            raise AssertionError(message)
        text = text.replace(old, new)
    script, typed = ["set -euo pipefail"], list[str]()
    commands: list[tuple[str, list[str]]] = []
    for line in text.splitlines():
        if line.startswith("$ "):
            typed = []
            commands.append((line[2:], typed))
        elif line.startswith("> "):
            typed.append(line[2:])
        elif line.strip():
            message = f"{document.name}: {line!r} is neither a command nor typed into one"
            raise AssertionError(message)
    for command, lines in commands:
        script.append(f"echo {_quoted('$ ' + command)}")
        if lines:
            words = " ".join(map(_quoted, lines))
            script.append(f"printf '%s\\n' {words} | {command}")
        else:
            script.append(command)
    return "\n".join(script) + "\n"


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
