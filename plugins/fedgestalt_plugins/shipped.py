"""Files that other installed packages ship; the packages themselves are never imported."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from fedgestalt.errors import ConfigError


def shipped_file(package: str, name: str) -> Path:
    """Path of the file ``name`` (relative to site-packages) of an installed ``package``.

    Raises:
        ConfigError: the package is not installed or does not ship the file.
    """
    try:
        installed = distribution(package)
    except PackageNotFoundError:
        remedy = f"install it: pip install {package}"
        raise ConfigError(f"the package {package} is not installed", remedy=remedy) from None
    path = Path(str(installed.locate_file(name)))
    if not path.is_file():
        what = f"{package} {installed.version} does not ship {name}"
        raise ConfigError(what, remedy="install the version that fedgestalt requires")
    return path
