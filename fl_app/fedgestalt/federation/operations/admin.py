"""An administrator's session with a consortium's server, over FLARE's own API."""

from __future__ import annotations

import contextlib
import io
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from nvflare.fuel.flare_api.api_spec import (
    AuthenticationError,
    AuthorizationError,
    InternalError,
    InvalidJobDefinition,
    JobNotDone,
    JobNotFound,
    JobNotRunning,
    NoConnection,
    NoReply,
    SessionClosed,
)
from nvflare.fuel.flare_api.flare_api import Session, new_secure_session

from fedgestalt.errors import ConfigError, ServerError, SiteError
from fedgestalt.federation.job.progress import OUTCOME_FILE
from fedgestalt.federation.job.status import PROGRESS_COMMAND, SCHEMA

CONNECT_SECONDS: Final = 15.0
_DONE = "FINISHED"
_RAISED = re.compile(r"^(?:[a-z_]\w*\.)*[A-Z]\w+: (.+)")
"""The last line of a traceback; where several are chained, the first names the cause."""
_LOGGED = re.compile(r"^\d{4}-\d\d-\d\d \S+ - \S+ - ERROR - (.+)")
_REASON_LIMIT = 500
_TOO_EARLY_SECONDS = 2.0
_NOT_NOW = (JobNotRunning, NoReply, InternalError, NoConnection)
"""While a job's process starts or ends; a server that is gone shows at the next question."""

OnStatus = Callable[[str, dict[str, Any]], None]
"""Called with FLARE's job status and our progress report (empty while the job does not run)."""


class AdminSession:
    """A connection to the server, closed by :meth:`close` or as a context.

    Args:
        kit: the administrator's startup kit.
        seconds: how long to try.

    Raises:
        ConfigError: the folder is no administrator's kit.
        ServerError: the server does not answer, or refuses.
    """

    def __init__(self, kit: Path, seconds: float = CONNECT_SECONDS) -> None:
        self.kit = kit
        self.user, self.server = _user_and_server(kit)
        try:
            with _flare_errors(self.server), _quiet():
                self._session: Session = new_secure_session(self.user, str(kit), timeout=seconds)
        except AttributeError:  # FLARE's own cleanup after a refused login
            raise _refused(self.server) from None
        except (RuntimeError, ValueError, TypeError, OSError) as error:
            raise ConfigError(
                f"this startup kit cannot be used ({error})",
                where=str(kit),
                remedy="fedgestalt doctor --startup-kit KIT says more",
            ) from None

    def __enter__(self) -> AdminSession:
        """Return the session itself."""
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """Log out."""
        with contextlib.suppress(Exception), _quiet():
            self._session.close()

    def connected_sites(self) -> list[str]:
        """Names of the sites that are connected now."""
        with _flare_errors(self.server):
            return sorted(client.name for client in self._session.get_system_info().client_info)

    def submit(self, folder: Path) -> str:
        """Submit a job folder; returns the job's id.

        Raises:
            ServerError: FLARE does not take it, or this user may not submit jobs.
        """
        with _flare_errors(self.server), _quiet():
            return str(self._session.submit_job(str(folder.resolve())))

    def status(self, job: str) -> str:
        """FLARE's status of a job, for example ``RUNNING`` or ``FINISHED:COMPLETED``."""
        with _flare_errors(self.server):
            return str(self._session.get_job_meta(job)["status"])

    def meta(self, job: str) -> dict[str, Any]:
        """What FLARE knows about a job."""
        with _flare_errors(self.server):
            return dict(self._session.get_job_meta(job))

    def wanted_sites(self, job: str) -> tuple[str, ...]:
        """Sites that a job names; empty if it takes whoever is connected."""
        deployed = self.meta(job).get("deploy_map", {})
        names = {
            target if isinstance(target, str) else str(target)
            for targets in (deployed.values() if isinstance(deployed, dict) else ())
            for target in (targets if isinstance(targets, list) else ())
        }
        return tuple(sorted(names - {"server", "@ALL"}))

    def jobs(self) -> list[dict[str, Any]]:
        """What FLARE knows about all jobs, newest first."""
        with _flare_errors(self.server):
            return [dict(job) for job in self._session.list_jobs(reverse=True)]

    def latest_job(self) -> str:
        """Id of the job that was submitted last.

        Raises:
            ConfigError: there is none.
        """
        for job in self.jobs():
            return str(job["job_id"])
        raise ConfigError("no job was submitted yet", where=self.server)

    def progress(self, job: str) -> dict[str, Any]:
        """Our own report of a running job, or an empty mapping if it does not run now."""
        try:
            with _flare_errors(self.server, let_pass=_NOT_NOW), _quiet():
                report = self._session.do_app_command(job, PROGRESS_COMMAND, {})
        except _NOT_NOW:
            return {}
        good = isinstance(report, dict) and report.get("schema") == SCHEMA
        return report if good else {}

    def stats(self, job: str) -> dict[str, Any]:
        """FLARE's ``show_stats`` of the server; our report stands in it under ``fedgestalt``."""
        with _flare_errors(self.server):
            return dict(self._session.show_stats(job, "server"))

    def abort(self, job: str) -> None:
        """End a job."""
        with _flare_errors(self.server), _quiet():
            self._session.abort_job(job)

    def disable_site(self, site: str) -> None:
        """Cut off a site; it cannot connect again until it is enabled."""
        with _flare_errors(self.server):
            self._session.disable_client(site)

    def shut_down(self) -> None:
        """Stop the server and all sites."""
        with _flare_errors(self.server), _quiet():
            self._session.shutdown("all", wait=False)

    def download(self, job: str, folder: Path) -> Path:
        """Fetch a finished job's result into ``folder``; returns where it lies."""
        with _flare_errors(self.server), _quiet():
            return Path(self._session.download_job_result(job, str(folder)))

    def reason(self, job: str, result: Path) -> str:
        """Why a job ended without an outcome of ours, from what FLARE kept; empty if unknown."""
        detail = self.meta(job).get("job_deploy_detail", ())
        refused = [str(said) for said in detail if not str(said).endswith(": OK")]
        if refused:
            return "; ".join(refused)
        for log in sorted(result.rglob("error_log.txt")):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
            causes = [found[1] for line in lines if (found := _RAISED.match(line))]
            logged = [found[1] for line in lines if (found := _LOGGED.match(line))]
            if causes or logged:
                return (causes[:1] or logged[-1:])[0][:_REASON_LIMIT]
        return ""

    def outcome(self, job: str) -> dict[str, Any]:
        """The ``outcome.json`` of a finished job, or an empty mapping if it left none."""
        with tempfile.TemporaryDirectory() as folder:
            return read_outcome(self.download(job, Path(folder)))

    def watch(
        self,
        job: str,
        on_status: OnStatus,
        poll_seconds: float = 1.0,
        limit_seconds: float = float("inf"),
    ) -> str:
        """Follow a job to its end; returns FLARE's last status.

        Raises:
            SiteError: the job has not ended within ``limit_seconds``.
        """
        deadline, ask_again = time.monotonic() + limit_seconds, 0.0
        while True:
            status, report = self.status(job), {}
            if status == "RUNNING" and time.monotonic() >= ask_again:
                report = self.progress(job)
                if not report:  # FLARE logs an error whenever it is asked too early
                    ask_again = time.monotonic() + _TOO_EARLY_SECONDS
            on_status(status, report)
            if status.startswith(_DONE):
                return status
            if time.monotonic() > deadline:
                raise SiteError(
                    f"it has not ended within {limit_seconds:.0f} seconds, its status is {status}",
                    where=f"job {job}",
                )
            time.sleep(poll_seconds)


def read_outcome(result: Path) -> dict[str, Any]:
    """The ``outcome.json`` in a downloaded result, or an empty mapping if there is none."""
    for path in result.rglob(OUTCOME_FILE):
        with contextlib.suppress(ValueError):
            outcome = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(outcome, dict):
                return outcome
    return {}


def _user_and_server(kit: Path) -> tuple[str, str]:
    path = kit / "startup" / "fed_admin.json"
    try:
        admin = json.loads(path.read_text(encoding="utf-8"))["admin"]
        return str(admin["username"]), f"{admin['host']}:{admin['port']}"
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(
            "is no administrator's startup kit",
            where=str(kit),
            remedy="name the folder that holds startup/fed_admin.json",
        ) from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """FLARE's API prints what it does; our users read our own lines."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _refused(server: str) -> ServerError:
    return ServerError(
        "the login was refused",
        where=server,
        remedy="check that this kit belongs to this consortium and is not expired"
        " (fedgestalt doctor --startup-kit KIT)",
    )


@contextlib.contextmanager
def _flare_errors(server: str, let_pass: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """FLARE's exceptions as sentences."""
    try:
        yield
    except let_pass:
        raise
    except NoConnection:
        raise ServerError(
            "the server does not answer",
            where=server,
            remedy="check that it runs and that its port is open"
            " (fedgestalt doctor --startup-kit KIT)",
        ) from None
    except AuthenticationError:
        raise _refused(server) from None
    except AuthorizationError as error:
        raise ServerError(
            f"this user may not do that ({error})", where=server, remedy="ask a project admin"
        ) from None
    except JobNotFound:
        raise ConfigError(
            "the server knows no such job",
            where=server,
            remedy="list_jobs in the console names them",
        ) from None
    except InvalidJobDefinition as error:
        raise ServerError(f"the job was not taken: {error}", where=server) from None
    except JobNotDone:
        raise ServerError(
            "a job is still running", where=server, remedy="abort it or wait for its end"
        ) from None
    except (InternalError, NoReply, SessionClosed, JobNotRunning) as error:
        raise ServerError(f"the server did not do what was asked ({error})", where=server) from None
