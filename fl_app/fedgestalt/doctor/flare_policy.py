"""What FLARE lets jobs do here: the files of the kit's folder ``local`` that are in force.

A job is somebody else's instruction to this machine. These files keep it to this project's code,
from people who signed it, with our guard at the door.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from fedgestalt.doctor.findings import LEAD, Check, NotCheckedError, check, ok, problem
from fedgestalt.doctor.kit import AUTHORIZATION, PRIVACY, RESOURCES, Kit

OURS: Final = "fedgestalt."
LAUNCHER: Final = "fedgestalt.federation.site.launcher.SiteJobLauncher"
GUARD: Final = "fedgestalt.federation.site.outgoing.OutgoingGuard"

_ALLOWED, _MODE = "class_allow_list", "class_list_enforcement_mode"
_FORBIDDEN: Final = ("byoc", "shell_commands", *("cat", "grep", "head", "ls", "pwd", "tail"))
"""Rights nobody may have: custom code, and the shell commands that are rights of their own."""


@check("flare.classes")
def classes(kit: Kit) -> Iterator[Check]:
    """Jobs get this project's components, and not any."""
    path = kit.local(RESOURCES)
    resources, file = kit.content(path), kit.shown(path)
    allowed, mode = resources.get(_ALLOWED, []), resources.get(_MODE, "enforce")
    if not isinstance(allowed, list):
        yield problem("flare.classes", f"{_ALLOWED} of {file} is no list", _restore(file))
    elif "*" in allowed:
        what = f'{_ALLOWED} of {file} has "*": a job could run any installed class'
        yield problem("flare.classes", what, _restore(file))
    elif mode != "enforce":
        what = f"{_MODE} of {file} is {mode!r}, so the list of allowed classes is not enforced"
        yield problem("flare.classes", what, f'set it to "enforce" in {kit.local(RESOURCES)}')
    elif not {OURS, OURS.rstrip(".")} & set(map(str, allowed)):
        what = f'{_ALLOWED} of {file} lacks "{OURS}": every job of this project would be refused'
        remedy = f'add "{OURS}" (with the dot) to {_ALLOWED} there'
        yield problem("flare.classes", what, remedy)
    else:
        what = f"jobs get this project's components and {len(allowed) - 1} of FLARE's, no others"
        yield ok("flare.classes", what, file=file, allowed=len(allowed))


def _restore(file: str) -> str:
    default = "" if file.endswith(".default") else f"; {file}.default has the consortium's"
    return f"restore {file} as {LEAD} provisioned it{default}"


@check("flare.launcher")
def launcher(kit: Kit) -> Iterator[Check]:
    """A job process that dies here stays this site's loss alone."""
    path = kit.local(RESOURCES)
    components, file = kit.content(path).get("components"), kit.shown(path)
    found = [
        str(component.get("path", ""))
        for component in (components if isinstance(components, list) else [])
        if isinstance(component, dict) and component.get("id") == "process_launcher"
    ]
    if found != [LAUNCHER]:
        what = (
            f"the process_launcher of {file} is {', '.join(found) or 'missing'}: a job process"
            " that dies here would end the job everywhere"
        )
        yield problem("flare.launcher", what, f"set its path to {LAUNCHER}")
    else:
        yield ok("flare.launcher", "a job process that dies here does not end the job elsewhere")


@check("flare.authorization")
def authorization(kit: Kit) -> Iterator[Check]:
    """Nobody may submit custom code or run shell commands."""
    path = kit.local(AUTHORIZATION)
    permissions, file = kit.content(path).get("permissions"), kit.shown(path)
    if not isinstance(permissions, dict) or not permissions:
        what = f"{file} has no permissions, so FLARE does not start"
        yield problem("flare.authorization", what, _restore(file))
        return
    granted = {str(role): rights for role, own in permissions.items() if (rights := _granted(own))}
    if granted:
        told = "; ".join(f"role {role} has {', '.join(r)}" for role, r in granted.items())
        what = f"{file} allows custom code or shell commands: {told}"
        yield problem("flare.authorization", what, f'set these to "none" in {path}')
    else:
        what = "no role may bring custom code or run shell commands"
        yield ok("flare.authorization", what, file=file, roles=sorted(map(str, permissions)))


def _granted(rights: Any) -> list[str]:
    """The forbidden rights that a role has; see FLARE's authorization policy."""
    if not isinstance(rights, dict):  # one expression for all rights
        return [] if _forbids(rights) else list(_FORBIDDEN)
    return [right for right in _FORBIDDEN if right in rights and not _forbids(rights[right])]


def _forbids(expression: Any) -> bool:
    """Whether a FLARE expression is false for everybody."""
    terms = [expression] if isinstance(expression, str) else expression
    if not isinstance(terms, list) or not terms:
        return False
    words = [" ".join(str(term).lower().split()) for term in terms]
    if any(word in ("not any", "not all") for word in words):
        return True
    positive = [word for word in words if not word.startswith("not ")]
    return bool(positive) and all(word in ("none", "no") for word in positive)


@check("flare.privacy")
def privacy(kit: Kit) -> Iterator[Check]:
    """Every result passes our guard, whichever scope a job names."""
    path = kit.local(PRIVACY)
    name, file = "flare.privacy", kit.shown(path)
    if not path.exists():
        what = f"{file} is missing: what leaves this site is neither checked nor written down"
        yield problem(name, what, f"restore it as {LEAD} provisioned it")
        return
    content = kit.content(path)
    scopes = content.get("scopes")
    scopes = scopes if isinstance(scopes, list) else []
    names = [scope.get("name") for scope in scopes if isinstance(scope, dict)]
    open_scopes = [str(s.get("name")) for s in scopes if isinstance(s, dict) and not _guards(s)]
    if not names or content.get("default_scope") not in names:
        yield problem(name, f"{file} has no default scope, so nothing is checked", _restore(file))
    elif open_scopes:
        what = f"results of jobs in scope {', '.join(open_scopes)} leave without our guard"
        yield problem(name, what, f"add {GUARD} to its task_result_filters in {path}")
    else:
        yield ok(name, "every result passes our guard and is written down before it leaves")


def _guards(scope: Mapping[str, Any]) -> bool:
    filters = scope.get("task_result_filters")
    own = filters if isinstance(filters, list) else []
    return any(isinstance(f, dict) and f.get("path") == GUARD for f in own)


@check("flare.signatures")
def signed_jobs(kit: Kit) -> Iterator[Check]:
    """Jobs that nobody signed are refused."""
    if kit.start().get("require_signed_jobs") is not True:
        what = f"startup/{kit.role.start} does not require signed jobs"
        yield problem("flare.signatures", what, 'set "require_signed_jobs": true in it')
    else:
        yield ok("flare.signatures", "jobs must be signed by their submitter")


@check("flare.environment")
def environment(kit: Kit) -> Iterator[Check]:
    """At a server: a site that vanished does not keep a job open."""
    script = kit.startup("sub_start.sh")
    if not script.is_file():
        raise NotCheckedError(f"{kit.shown(script)} is missing")
    variable = "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT"
    if variable not in script.read_text(encoding="utf-8", errors="replace"):
        what = f"sub_start.sh does not set {variable}: a vanished site keeps a job open for long"
        yield problem("flare.environment", what, f"add `export {variable}=10` before its loop")
    else:
        yield ok("flare.environment", "a vanished site does not keep a job open")
