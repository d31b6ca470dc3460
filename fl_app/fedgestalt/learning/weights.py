"""Start weights from files: a job names a file, each machine has its own folder for them.

A job never says where a file is: it could have a site open any file that its process can read, and
the fault it reports would tell what is there. Everybody must have the same file under one name; the
digests are compared before anything is trained.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any, Final

from fedgestalt.contracts import FromWeights
from fedgestalt.errors import ConfigError, SiteError
from fedgestalt.hooks.registry import Registry

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def check_name(options: Any, where: str) -> None:
    """Refuse weights that are named by a path.

    Raises:
        ConfigError: they are.
    """
    if isinstance(options, FromWeights) and options.weights is not None:
        name = str(options.weights)
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"weights {name[:200]!r} is not the name of a file",
                where=where,
                remedy="name the file alone; each machine has it in its own weights folder",
            )


def find_weights(options: Any, registry: Registry, where: str) -> Any:
    """Options whose weights file, if they name one, is that of this machine.

    Args:
        options: of a backbone.
        registry: with this machine's folder.
        where: for errors.

    Raises:
        ConfigError: a path instead of a name.
        SiteError: this machine has no such file, or not the one that the job means.
    """
    if not isinstance(options, FromWeights) or options.weights is None:
        return options
    check_name(options, where)
    name = str(options.weights)
    if registry.weights is None:
        raise SiteError(
            f"weights {name!r} are needed, and this machine has no weights folder",
            where=where,
            remedy="set `weights` in fedgestalt.yaml; outside of jobs, set FEDGESTALT_WEIGHTS",
        )
    path = registry.weights / name
    if not path.is_file():
        raise SiteError(
            f"there is no file {name!r} in this machine's weights folder",
            where=where,
            remedy="put it there, the same file everywhere",
        )
    if options.weights_sha256 and weights_digest(path) != options.weights_sha256:
        raise SiteError(
            f"the weights file {name!r} does not have the digest that the job names",
            where=where,
            remedy="get the file that weights_sha256 belongs to",
        )
    return options.model_copy(update={"weights": path})


def without_place(error: ConfigError, path: Path, where: str) -> SiteError:
    """A fault of a weights file as anybody may read it: with its name, not its folder."""
    what, remedy = (said.replace(str(path), path.name) for said in (error.what, error.remedy))
    return SiteError(what, where=f"{where}, weights file {path.name}", remedy=remedy)


def weights_digest(path: Path) -> str:
    """SHA-256 over a file, hexadecimal.

    Raises:
        SiteError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise SiteError(f"weights file {path.name!r} cannot be read ({error.strerror})") from None
