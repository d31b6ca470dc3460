"""Is this site ready? What ``fedgestalt doctor`` examines, in the order in which it shows it.

Checks are functions that return :class:`~fedgestalt.doctor.findings.Check` objects and never raise.
They leave nothing behind: no file in the store, no entry in the feature cache, no connection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from fedgestalt.console import Steps
from fedgestalt.doctor import flare_policy, network, site_policy, software
from fedgestalt.doctor import kit as kits
from fedgestalt.doctor.findings import Check, check, not_checked
from fedgestalt.doctor.kit import ADMIN, SERVER, SITE, Kit, open_kit
from fedgestalt.errors import ConfigError
from fedgestalt.federation.site.settings import SiteSettings
from fedgestalt.hooks import get_registry
from fedgestalt.hooks.registry import Registry
from fedgestalt.jobs import TrainingJob

_TRUSTED = ("kit.certificate", "kit.key")


@dataclass(frozen=True)
class Request:
    """What to examine.

    Attributes:
        startup_kit: folder of a FLARE startup kit of a site, a server or an administrator.
        data: the cohort; that of the site's policy by default.
        dry_run: whether to compute one batch.
        job: the training job to measure by.
        registry: the plugins; the installed ones by default.
    """

    startup_kit: Path | None = None
    data: Path | None = None
    dry_run: bool = True
    job: TrainingJob = field(default_factory=TrainingJob)
    registry: Registry | None = None


def examine(request: Request, steps: Steps, now: datetime | None = None) -> list[Check]:
    """Make all checks that ``request`` allows.

    Args:
        request: what to examine.
        steps: shows progress.
        now: the time to compare certificates with; the machine's by default.

    Raises:
        ConfigError: the call is wrong; nothing was examined.
    """
    kit = open_kit(request.startup_kit) if request.startup_kit else None
    _check_call(request, kit)
    now, registry = now or datetime.now(UTC), request.registry or get_registry()
    found = _software(kit, registry)
    settings = None
    if kit:
        with steps.step("kit", "Startup kit and server"):
            found += _kit(kit, now)
        if kit.role is SITE:
            settings = site_policy.settings_of(kit)
            found += _policy(kit, settings, request.data, registry)
    data = request.data or (settings.data_folder(kit.name) if kit and settings else None)
    if kit is None or kit.role is SITE:
        store = settings.store_folder(kit.name) if kit and settings else None
        found += _computing(
            request, registry, settings, kit.name if kit else "", data, store, steps
        )
    elif kit.role is SERVER:
        found += _server_machine(kit)
    return found


def _check_call(request: Request, kit: Kit | None) -> None:
    if request.data and kit and kit.role is not SITE:
        remedy = "leave --data out, or name the startup kit of a site"
        raise ConfigError(
            f"the kit is that of {kit.role.title}, which holds no data", remedy=remedy
        )
    if request.data and not request.data.is_dir():
        where = str(request.data)
        raise ConfigError("there is no such folder", where=where, remedy="name the data folder")


def _software(kit: Kit | None, registry: Registry) -> list[Check]:
    found = [*software.python(), *software.code(), *software.nvflare(), *software.torch()]
    found += software.plugins(registry)
    return found + software.path(kit) if kit else found


def _kit(kit: Kit, now: datetime) -> list[Check]:
    found = kits.kit_files(kit) + kits.kit_certificate(kit, now) + kits.kit_key(kit)
    trusted = all(c.state in ("ok", "warning") for c in found if c.name in _TRUSTED)
    found += kits.kit_permissions(kit) + kits.kit_dates(kit, now)
    found += kits.kit_signatures(kit) + kits.kit_process(kit)
    found += network.listen(kit) if kit.role is SERVER else network.network(kit, trusted, now)
    if kit.role is not ADMIN:
        found += flare_policy.classes(kit)
        found += flare_policy.launcher(kit) if kit.role is SITE else []
        found += flare_policy.authorization(kit)
        found += flare_policy.privacy(kit) if kit.role is SITE else []
        found += flare_policy.signed_jobs(kit)
        found += flare_policy.environment(kit) if kit.role is SERVER else []
    return found


def _policy(
    kit: Kit, settings: SiteSettings | None, data: Path | None, registry: Registry
) -> list[Check]:
    found = site_policy.rules(kit, registry)
    if settings:
        folder = data or settings.data_folder(kit.name)
        found += site_policy.data_folder(folder)
        found += site_policy.store_folder(settings.store_folder(kit.name), folder)
        if weights := settings.weights_folder(kit.name):
            found += site_policy.weights_folder(weights)
    else:
        found += not_checked("policy.data", "the site's policy cannot be read")
        found += not_checked("policy.store", "the site's policy cannot be read")
    return found


@check("machine.room")
def _server_machine(kit: Kit) -> Iterator[Check]:
    from fedgestalt.doctor import machine

    yield from machine.cpu(None, 1)
    yield from machine.memory(None)
    yield from machine.server_room(kit.folder)


@check("machine.computing")
def _computing(
    request: Request,
    registry: Registry,
    settings: SiteSettings | None,
    site: str,
    folder: Path | None,
    store: Path | None,
    steps: Steps,
) -> Iterator[Check]:
    """Data, machine and dry run; torch is loaded here, for it may be what is broken."""
    from fedgestalt.doctor import computing

    yield from computing.examine(
        request.job, registry, settings, site, folder, store, steps, request.dry_run
    )
