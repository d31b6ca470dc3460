"""What a site decides for itself: ``local/fedgestalt.yaml`` in its FLARE workspace.

A job never says where a site keeps its data or how much of the machine it may use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field

from fedgestalt.errors import ConfigError
from fedgestalt.hooks.registry import read_options
from fedgestalt.learning.spec import Spec

FILE_NAME = "fedgestalt.yaml"


class SiteSettings(Spec):
    """Settings of one site; ``{site}`` in a path stands for the site's name."""

    data: str = Field(description="the site's cohort, a folder in GMDB layout")
    store: str = Field(description="where the site keeps models, features and its own results")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1, description="CPU threads; default all")
    minimum_sites: int = Field(
        default=3, ge=3, description="fewest sites with which this site takes part in a sum"
    )
    max_released_rows: int = Field(
        default=200, ge=1, description="most rows per query that any site may get in a job"
    )
    evaluation_release: bool = Field(
        default=False,
        description="whether this site takes part in evaluation jobs, which show every site the"
        " scores of its test images against all images of the others",
    )

    def data_folder(self, site: str) -> Path:
        """The folder with the cohort of ``site``."""
        return Path(self.data.replace("{site}", site))

    def store_folder(self, site: str) -> Path:
        """The folder that only ``site`` reads and writes."""
        return Path(self.store.replace("{site}", site))


def read_settings(folder: Path) -> SiteSettings:
    """Read the settings from a site's ``local`` folder.

    Raises:
        ConfigError: the file is missing, is no YAML mapping, or has a wrong or unknown key.
    """
    path = folder / FILE_NAME
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(
            f"this site has no {FILE_NAME}",
            where=str(folder),
            remedy="write one that names the folders data and store",
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError("is not YAML", where=str(path)) from None
    if not isinstance(content, dict):
        raise ConfigError("is not a YAML mapping", where=str(path))
    return read_options(SiteSettings, content, where=str(path))
