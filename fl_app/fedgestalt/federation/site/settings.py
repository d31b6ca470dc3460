"""What a site decides for itself: ``local/fedgestalt.yaml`` in its FLARE workspace.

A job never says where a site keeps its data, how much of the machine it may use, or what may leave
the site. Every check here is made at the site, before any record or image is read.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Final, Literal

import yaml
from pydantic import Field

from fedgestalt.errors import ConfigError, SiteError
from fedgestalt.hooks.registry import read_options
from fedgestalt.learning.spec import Spec

FILE_NAME = "fedgestalt.yaml"
_DISCOVER: Final = "discover"
ALL_ROWS = 0
"""As the rows a job asks for: an evaluation release, every row for every query."""


class SiteSettings(Spec):
    """Settings and policy of one site; ``{site}`` in a path stands for the site's name."""

    data: str = Field(description="the site's cohort, a folder in GMDB layout")
    store: str = Field(description="where the site keeps models, features and its own results")
    weights: str | None = Field(
        default=None,
        description="folder of the weights files that jobs name, for backbones that begin from one",
    )
    label_map: str = Field(
        default="",
        description="the label map that the consortium agreed on, a folder in GMDB layout of which"
        " the syndrome table and the class list are read; a cohort that differs from it takes part"
        " in no job; empty: only digests are compared",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="what trains and encodes; auto takes a GPU if there is one"
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; default all")
    processes: int = Field(
        default=1,
        ge=1,
        le=64,
        description="processes that compute features of photographs, each with a GPU of its own"
        " where there are several, and an equal share of the threads",
    )
    jobs: tuple[str, ...] = Field(
        default=("train_ensemble", "match", "onboard", "gallery", "discover"),
        description="job templates this site takes part in",
    )
    partners: tuple[str, ...] = Field(
        default=(), description="the only sites it works with; empty: any of the consortium"
    )
    excluded_sites: tuple[str, ...] = Field(
        default=(), description="sites that it does not work with, for example one that has left"
    )
    minimum_sites: int = Field(
        default=3, ge=3, description="fewest sites with which this site takes part in a sum"
    )
    minimum_survivors: int = Field(
        default=3,
        ge=2,
        description="fewest sites in a sum that this site helps to open; with 2, each of them could"
        " tell the other's update from it",
    )
    threat_model: Literal["malicious", "honest-but-curious"] = Field(
        default="malicious",
        description="what the server may do without learning more than the sum; with"
        " `honest-but-curious`, which trusts it to follow the protocol, more sites may be lost",
    )
    reveal_aggregate_to: Literal["server", "sites"] = Field(
        default="server",
        description="with `sites`, it takes part in no training whose sums the server learns",
    )
    identity: Literal["kit", "ephemeral"] = Field(
        default="kit",
        description="`kit` signs with the startup kit's certificate; `ephemeral` proves nothing and"
        " is for the simulator alone",
    )
    strategies: tuple[str, ...] = Field(
        default=(), description="matching strategies it takes part in; empty: any installed one"
    )
    weight_licences: tuple[str, ...] = Field(
        default=("Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "CC-BY-4.0", "CC0-1.0", "MIT"),
        description="SPDX licences of start weights that this site may use; random ones need none",
    )
    max_released_rows: int = Field(
        default=200, ge=1, description="most rows per query that any site may get in a job"
    )
    evaluation_release: bool = Field(
        default=False,
        description="whether this site takes part in evaluation jobs, which show every site the"
        " scores of its test images against all images of the others",
    )
    max_queries_per_job: int = Field(
        default=2000,
        ge=1,
        description="most queries that any one site may ask in a job, images of its yardstick"
        " included",
    )
    max_queries_per_day: int = Field(
        default=10_000, ge=1, description="most queries that any one site may ask in a day (UTC)"
    )
    minimum_images_per_syndrome: int = Field(
        default=1,
        ge=1,
        description="this site enrols only syndromes of which it has as many images",
    )
    reveal_hospital: bool = Field(
        default=False, description="whether other hospitals see that a released row is this one's"
    )
    discovery: bool = Field(
        default=False,
        description="whether this site's unsolved cases are compared with those of other hospitals"
        " (template `discover`)",
    )
    release_hpo_terms: bool = Field(
        default=False,
        description="whether other hospitals get the HPO terms of a released row's patient, sealed"
        " from the server",
    )
    max_update_norm: float = Field(
        default=1.0,
        gt=0,
        description="largest change of the model in one round, in norms of the model itself; a"
        " larger one, its own or the consortium's, is refused",
    )

    def data_folder(self, site: str) -> Path:
        """The folder with the cohort of ``site``."""
        return Path(self.data.replace("{site}", site))

    def label_map_folder(self, site: str) -> Path | None:
        """The folder with the consortium's label map, if ``site`` compares its own with it."""
        return Path(self.label_map.replace("{site}", site)) if self.label_map else None

    def store_folder(self, site: str) -> Path:
        """The folder that only ``site`` reads and writes."""
        return Path(self.store.replace("{site}", site))

    def weights_folder(self, site: str) -> Path | None:
        """The folder with the weights files of ``site``, if it has one."""
        return Path(self.weights.replace("{site}", site)) if self.weights else None

    def check_job(self, template: str) -> None:
        """Raise SiteError if this site does not take part in such jobs."""
        if template not in self.jobs:
            raise _refusal(f"does not take part in jobs of the kind {template!r}", "jobs")
        if template == _DISCOVER and not self.discovery:
            raise _refusal("compares no unsolved case with those of other hospitals", "discovery")

    def check_roster(self, site: str, roster: Collection[str]) -> None:
        """Raise SiteError if ``site`` does not work with exactly these sites."""
        if site not in roster:
            raise SiteError("the job's roster does not name this site", remedy="submit it again")
        others = sorted(set(roster) - {site})
        strangers = [o for o in others if self.partners and o not in self.partners]
        if strangers:
            raise _refusal(f"does not work with {', '.join(strangers)}", "partners")
        excluded = [other for other in others if other in self.excluded_sites]
        if excluded:
            raise _refusal(f"does not work with {', '.join(excluded)}", "excluded_sites")
        if len(others) + 1 < self.minimum_sites:
            raise _refusal(
                f"takes part with {self.minimum_sites} sites or more, the job has"
                f" {len(others) + 1}; with fewer, single updates could be told from the sum",
                "minimum_sites",
            )

    def check_aggregation(self, recipient: str, threat_model: str) -> None:
        """Raise SiteError if a training job protects less than this site asks for."""
        if self.reveal_aggregate_to == "sites" and recipient != "sites":
            raise _refusal("lets no server learn the sum of updates", "reveal_aggregate_to")
        if self.threat_model == "malicious" and threat_model != "malicious":
            raise _refusal(
                f"does not trust the server to follow the protocol, the job does ({threat_model})",
                "threat_model",
            )

    def check_strategy(self, strategy: str) -> None:
        """Raise SiteError if this site does not mask by ``strategy``."""
        if self.strategies and strategy not in self.strategies:
            raise _refusal(f"does not take part in matching by {strategy!r}", "strategies")

    def check_release(self, rows: int) -> None:
        """Raise SiteError if a job asks for more rows per query than this site releases."""
        if rows == ALL_ROWS and not self.evaluation_release:
            raise _refusal(
                "releases no scores of all images, which an evaluation asks for",
                "evaluation_release",
            )
        if rows > self.max_released_rows:
            raise _refusal(
                f"releases {self.max_released_rows} rows per query, the job asks for {rows}",
                "max_released_rows",
            )

    def check_queries(self, site: str, count: int, today: int) -> None:
        """Raise SiteError if ``site`` asks too much.

        Args:
            site: who asks.
            count: queries in this job.
            today: queries in other jobs of this day.
        """
        if count > self.max_queries_per_job:
            raise _refusal(
                f"answers {self.max_queries_per_job} queries of a site in a job, {site} asks"
                f" {count}",
                "max_queries_per_job",
            )
        if today + count > self.max_queries_per_day:
            raise _refusal(
                f"answers {self.max_queries_per_day} queries of a site in a day, {site} has asked"
                f" {today} and asks {count} more",
                "max_queries_per_day",
            )

    def check_licences(self, licences: Mapping[str, str]) -> None:
        """Raise SiteError if start weights have a licence that this site may not use.

        Args:
            licences: by ensemble member; empty for random weights.
        """
        for member, licence in licences.items():
            if licence and licence not in self.weight_licences:
                raise _refusal(
                    f"may not use weights under {licence} (ensemble member {member!r})",
                    "weight_licences",
                )


def _refusal(what: str, key: str) -> SiteError:
    return SiteError(
        f"this site {what}",
        remedy=f"change the job, or ask the site to change {key} in its {FILE_NAME}",
    )


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
