"""A FLARE provisioning Builder: name it in ``project.yml`` after the StaticFileBuilder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from nvflare.lighter.spec import Builder, Project, ProvisionContext

OUR_CLASSES: Final = "fedgestalt."
"""A class allow list entry; the trailing dot allows the whole package."""


class FedgestaltPolicyBuilder(Builder):  # type: ignore[misc]
    """Puts this project's classes on the class allow list of the server and of every site.

    Without it every job fails with "component not authorized". Nothing else is allowed by it:
    plugins are looked up by name and need no entry.
    """

    def build(self, project: Project, ctx: ProvisionContext) -> None:
        """Extend the enforced default policy of every kit."""
        for participant in [project.get_server(), *project.get_clients()]:
            path = Path(ctx.get_local_dir(participant)) / "resources.json.default"
            resources = json.loads(path.read_text(encoding="utf-8"))
            allowed = resources.setdefault("class_allow_list", [])
            if OUR_CLASSES not in allowed:
                allowed.append(OUR_CLASSES)
            path.write_text(json.dumps(resources, indent=2), encoding="utf-8")
