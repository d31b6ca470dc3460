"""A startup kit of FLARE: what it consists of, and whether it is complete, private and in date."""

from __future__ import annotations

import base64
import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import psutil
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from fedgestalt.doctor.findings import LEAD, Check, NotCheckedError, check, ok, problem, warning
from fedgestalt.errors import ConfigError

ROOT: Final = "rootCA.pem"
RESOURCES, AUTHORIZATION, PRIVACY = "resources.json", "authorization.json", "privacy.json"
SIGNATURES: Final = "signature.json"
_DEFAULT: Final = ".default"

_RENEW: Final = timedelta(days=30)
_FUTURE: Final = timedelta(hours=26)
"""Archives keep local time without its zone: so much later may a file be dated than it is."""

_NEW_KIT: Final = f"ask {LEAD} for a new kit"
_UNPACK: Final = f"unpack the kit again, or ask {LEAD} for it"
_UID: Final = re.compile(r"\buid=(\S+)")


@dataclass(frozen=True)
class Role:
    """What a kind of kit is made of.

    Attributes:
        name: for machines.
        title: for people.
        start: the file in ``startup`` that tells the kinds apart.
        pair: stem of certificate and private key.
        scripts: that start FLARE.
    """

    name: Literal["site", "server", "admin"]
    title: str
    start: str
    pair: str
    scripts: tuple[str, ...]


SITE: Final = Role("site", "a site", "fed_client.json", "client", ("start.sh", "sub_start.sh"))
SERVER: Final = Role(
    "server", "a server", "fed_server.json", "server", ("start.sh", "sub_start.sh")
)
ADMIN: Final = Role("admin", "an administrator", "fed_admin.json", "client", ("fl_admin.sh",))


@dataclass(frozen=True)
class Endpoint:
    """Where the server is, according to a kit.

    Attributes:
        host, port: to connect to.
        scheme: ``grpc``, or another of FLARE's.
        security: ``mtls``, ``tls`` or ``clear``.
        identity: common name of the server's certificate; empty if the kit does not say.
    """

    host: str
    port: int
    scheme: str
    security: str
    identity: str

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"

    @property
    def speaks_grpc(self) -> bool:
        """Whether FLARE talks gRPC there, and so HTTP/2."""
        return "grpc" in self.scheme


@dataclass(frozen=True)
class Kit:
    """A startup kit, unpacked."""

    folder: Path
    role: Role

    def startup(self, name: str) -> Path:
        """A file of ``startup``."""
        return self.folder / "startup" / name

    def local(self, name: str) -> Path:
        """The file of ``local`` that is in force: FLARE takes ``name`` instead of its default."""
        own = self.folder / "local" / name
        default = own.with_name(name + _DEFAULT)
        return default if default.exists() and not own.exists() else own

    @property
    def certificate(self) -> Path:
        """The kit's own certificate."""
        return self.startup(f"{self.role.pair}.crt")

    @property
    def key(self) -> Path:
        """Its private key."""
        return self.startup(f"{self.role.pair}.key")

    @property
    def root(self) -> Path:
        """The certificate of the consortium's authority."""
        return self.startup(ROOT)

    def shown(self, path: Path) -> str:
        """A path as seen from the kit."""
        return path.relative_to(self.folder).as_posix()

    def content(self, path: Path) -> dict[str, Any]:
        """A JSON file of the kit.

        Raises:
            NotCheckedError: it cannot be read; ``kit.files`` says so.
        """
        fault = self.json_fault(path)
        if fault:
            raise NotCheckedError(f"{self.shown(path)} {fault}")
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def json_fault(self, path: Path) -> str:
        """Why a file cannot be read as a JSON object; empty if it can."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return "is missing"
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        except ValueError as error:
            line = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
            return f"is not valid JSON{line}"
        return "" if isinstance(content, dict) else "is not a JSON object"

    def start(self) -> dict[str, Any]:
        """The content of the start file; raises NotCheckedError."""
        return self.content(self.startup(self.role.start))

    def names(self) -> dict[str, str]:
        """What the kit's participant is called, by the place that says so."""
        said: dict[str, object] = {}
        script = self.startup("sub_start.sh")
        if self.role is SITE and script.is_file():
            found = _UID.search(script.read_text(encoding="utf-8", errors="replace"))
            said["sub_start.sh"] = found[1] if found else ""
        try:
            start = self.start()
        except NotCheckedError:
            start = {}
        if self.role is SITE:
            name = _inside(start, "client", "fqsn")
            said[SITE.start] = name.rpartition(".")[2] if isinstance(name, str) else ""
        elif self.role is SERVER:
            said[SERVER.start] = _inside(start, "servers", 0, "admin_server")
        else:
            said[ADMIN.start] = _inside(start, "admin", "username")
        return {place: name for place, name in said.items() if isinstance(name, str) and name}

    @property
    def name(self) -> str:
        """The participant's name; that of the kit's folder if its files do not say."""
        return next(iter(self.names().values()), self.folder.resolve().name)

    def endpoint(self) -> Endpoint:
        """Where the server is; raises NotCheckedError if the start file does not say."""
        start = self.start()
        if self.role is ADMIN:
            host, port = _inside(start, "admin", "host"), _inside(start, "admin", "port")
            said = _inside(start, "admin")
            scheme, identity = _inside(said, "scheme"), _inside(said, "server_identity")
        else:
            target = _inside(start, "servers", 0, "service", "target")
            host, _, port = str(target or "").rpartition(":")
            said = _inside(start, "client") if self.role is SITE else _inside(start, "servers", 0)
            scheme = _inside(start, "servers", 0, "service", "scheme")
            identity = _inside(start, "servers", 0, "identity")
        security = _inside(said, "connection_security")
        if not host or not str(port).isdecimal() or not 0 < int(port) < 2**16:
            raise NotCheckedError(f"startup/{self.role.start} names no server as host:port")
        return Endpoint(
            str(host).strip("[]"),
            int(port),
            str(scheme or "grpc"),
            str(security or "mtls"),
            str(identity or ""),
        )


def _inside(content: Any, *path: str | int) -> Any:
    """What lies at ``path`` in nested mappings and lists; None if there is nothing."""
    for part in path:
        try:
            content = content[part]
        except (KeyError, IndexError, TypeError):
            return None
    return content


def open_kit(folder: Path) -> Kit:
    """Find out what kind of kit lies in ``folder``.

    Raises:
        ConfigError: there is no such folder, or no kit in it.
    """
    if not folder.is_dir():
        raise ConfigError("there is no such folder", where=str(folder), remedy="name a startup kit")
    roles = (SITE, SERVER, ADMIN)
    for place in (folder, folder.absolute().parent):  # the folder startup of a kit is good enough
        for role in roles:
            if (place / "startup" / role.start).exists() and (
                place == folder or folder.name == "startup"
            ):
                return Kit(place, role)
    names = ", ".join(role.start for role in roles[:-1])
    raise ConfigError(
        f"is no startup kit: its folder startup has no {names} or {roles[-1].start}",
        where=str(folder),
        remedy="unpack the kit, and name the folder that holds startup and local",
    )


@check("kit.files")
def kit_files(kit: Kit) -> Iterator[Check]:
    """Everything is there that FLARE needs, and can be read."""
    faults, texts = [], [kit.startup(kit.role.start)]
    if kit.role is not ADMIN:
        texts += [kit.local(RESOURCES), kit.local(AUTHORIZATION)]
    texts += [p for p in (kit.local(PRIVACY), kit.startup(SIGNATURES)) if p.exists()]
    faults += [f"{kit.shown(path)} {fault}" for path in texts if (fault := kit.json_fault(path))]
    scripts = [kit.startup(name) for name in kit.role.scripts]
    for path in (kit.certificate, kit.key, kit.root, *scripts):
        if fault := _reading_fault(path):
            faults.append(f"{kit.shown(path)} {fault}")
    if not faults:
        try:
            kit.endpoint()
        except NotCheckedError as reason:
            faults.append(str(reason))
    if faults:
        yield problem("kit.files", "; ".join(faults), _UNPACK)
    else:
        what = f"the kit of {kit.role.title} called {kit.name!r}, complete"
        yield ok("kit.files", what, role=kit.role.name, participant=kit.name)


def _reading_fault(path: Path) -> str:
    try:
        return "" if path.read_bytes() else "is empty"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _needed(kit: Kit, *paths: Path) -> None:
    for path in paths:
        if fault := _reading_fault(path):
            raise NotCheckedError(f"{kit.shown(path)} {fault}")


@check("kit.certificate")
def kit_certificate(kit: Kit, now: datetime) -> Iterator[Check]:
    """The certificate is ours, from this consortium, and in date."""
    _needed(kit, kit.certificate, kit.root)
    name = "kit.certificate"
    chain, roots = _certificates(kit.certificate), _certificates(kit.root)
    if not chain or not roots:
        broken = kit.shown(kit.root if chain else kit.certificate)
        yield problem(name, f"{broken} is not a certificate", _UNPACK)
        return
    own = chain[0]
    fault, remedy = _dates_fault([*chain, *roots], now)
    if not _issued(chain, roots):
        fault = f"the certificate was not issued by the authority in {kit.shown(kit.root)}"
        remedy = f"{_UNPACK}; files of two consortia may have been mixed"
    elif not fault:
        fault = _name_fault(kit, own)
        remedy = f"{_UNPACK}; do not rename a participant by hand"
    ends = min(c.not_valid_after_utc for c in (*chain, *roots))
    figures = {"common_name": common_name(own), "valid_until": ends.isoformat()}
    if fault:
        yield problem(name, fault, remedy, **figures)
        return
    days = (ends - now).days
    if ends - now < _RENEW:
        what = f"the certificate expires in {days} days, on {ends:%Y-%m-%d}"
        yield warning(name, what, f"{_NEW_KIT} before that day", **figures, days_left=days)
        return
    what = f"of {common_name(own)!r}, issued by this consortium, valid until {ends:%Y-%m-%d}"
    yield ok(name, what, **figures, days_left=days)


def _dates_fault(certificates: list[x509.Certificate], now: datetime) -> tuple[str, str]:
    ends = min(certificate.not_valid_after_utc for certificate in certificates)
    begins = max(certificate.not_valid_before_utc for certificate in certificates)
    if now > ends:
        return f"the certificate expired on {ends:%Y-%m-%d}", _NEW_KIT
    if now < begins:
        what = (
            f"the certificate is valid from {begins:%Y-%m-%d %H:%M} UTC on,"
            f" and this machine's clock says {now:%Y-%m-%d %H:%M}"
        )
        return what, "set the clock (NTP), which is probably behind"
    return "", ""


def _name_fault(kit: Kit, own: x509.Certificate) -> str:
    for place, name in kit.names().items():
        if name != common_name(own):
            return f"the certificate is that of {common_name(own)!r}, {place} says {name!r}"
    if kit.role is SERVER:
        try:
            host = kit.endpoint().host
        except NotCheckedError:
            return ""
        if host not in _host_names(own):
            return f"the certificate does not name {host!r}, by which sites call this server"
    return ""


def _host_names(certificate: x509.Certificate) -> set[str]:
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return {common_name(certificate)}
    addresses = names.get_values_for_type(x509.IPAddress)
    return {*names.get_values_for_type(x509.DNSName), *map(str, addresses)}


def _certificates(path: Path) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except ValueError:
        return []


def common_name(certificate: x509.Certificate) -> str:
    """CN of a certificate's subject; empty if it has none."""
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def _issued(chain: list[x509.Certificate], roots: list[x509.Certificate]) -> bool:
    """Whether each certificate is issued by the next, and the last by one of ``roots``."""
    return all(_issued_by(lower, upper) for lower, upper in pairwise(chain)) and any(
        _issued_by(chain[-1], root) for root in roots
    )


def _issued_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


@check("kit.key")
def kit_key(kit: Kit) -> Iterator[Check]:
    """The private key belongs to the certificate."""
    _needed(kit, kit.key, kit.certificate)
    chain = _certificates(kit.certificate)
    if not chain:
        raise NotCheckedError(f"{kit.shown(kit.certificate)} is not a certificate")
    try:
        key = serialization.load_pem_private_key(kit.key.read_bytes(), password=None)
    except (ValueError, TypeError):
        yield problem("kit.key", f"{kit.shown(kit.key)} is not an open private key", _UNPACK)
        return
    if key.public_key() != chain[0].public_key():
        what = f"{kit.shown(kit.key)} does not belong to {kit.shown(kit.certificate)}"
        yield problem("kit.key", what, f"{_UNPACK}; files of two kits may have been mixed")
    else:
        yield ok("kit.key", "the private key belongs to the certificate")


@check("kit.permissions")
def kit_permissions(kit: Kit) -> Iterator[Check]:
    """The private key is readable by its user alone, and nothing is writable by everybody."""
    _needed(kit, kit.key)
    name = "kit.permissions"
    mode = stat.S_IMODE(kit.key.stat().st_mode)
    if mode & 0o077:
        what = f"{kit.shown(kit.key)} can be read or changed by other users (mode {mode:04o})"
        yield problem(name, what, f"run `chmod 600 {kit.key}`", mode=f"{mode:04o}")
        return
    loose = [path for path in (kit.folder, *_files(kit)) if path.stat().st_mode & stat.S_IWOTH]
    if loose:
        first = kit.shown(loose[0]) if loose[0] != kit.folder else "the kit's folder"
        others = f" and {len(loose) - 1} more" if loose[1:] else ""
        what = f"every user can change {first}{others}, so also what FLARE does here"
        yield warning(name, what, f"run `chmod -R o-w {kit.folder}`", mode=f"{mode:04o}")
        return
    what = "the private key is readable by its user alone, and the kit is not open to all"
    yield ok(name, what, mode=f"{mode:04o}")


def _files(kit: Kit) -> list[Path]:
    """What came with the kit: the folders ``startup`` and ``local`` and the files in them."""
    folders = [kit.folder / name for name in ("startup", "local") if (kit.folder / name).is_dir()]
    found = [path for folder in folders for path in sorted(folder.rglob("*"))]
    return [*folders, *(path for path in found if path.exists() and not path.is_symlink())]


@check("kit.dates")
def kit_dates(kit: Kit, now: datetime) -> Iterator[Check]:
    """The files are older than now."""
    newest = max((path.stat().st_mtime for path in _files(kit) if path.is_file()), default=0.0)
    dated = datetime.fromtimestamp(newest, now.tzinfo)
    if dated - now > _FUTURE:
        what = (
            f"a file of the kit is dated {dated:%Y-%m-%d}, later than this machine's clock says"
            f" ({now:%Y-%m-%d})"
        )
        yield warning("kit.dates", what, "set the clock (NTP), which is probably behind")
    else:
        yield ok("kit.dates", "no file of the kit is dated in the future")


@check("kit.signatures")
def kit_signatures(kit: Kit) -> Iterator[Check]:
    """A signed kit is unchanged; FLARE signs only kits for special uses."""
    path = kit.startup(SIGNATURES)
    if not path.exists():
        return
    _needed(kit, kit.root)
    signatures, roots = kit.content(path), _certificates(kit.root)
    key = roots[0].public_key() if roots else None
    if not isinstance(key, rsa.RSAPublicKey):
        raise NotCheckedError(f"{kit.shown(kit.root)} holds no RSA certificate")
    names = sorted(p.name for p in path.parent.iterdir() if p.is_file() and p != path)
    changed = [name for name in names if not _is_signed(kit.startup(name), signatures, key)]
    if changed:
        what = f"{', '.join(changed)} in startup differ from what was signed"
        yield problem("kit.signatures", what, f"{_UNPACK}; signed files must not be edited")
    else:
        yield ok("kit.signatures", f"all {len(names)} files of startup are as they were signed")


def _is_signed(path: Path, signatures: dict[str, Any], key: rsa.RSAPublicKey) -> bool:
    scheme = padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.MAX_LENGTH)
    try:
        signature = base64.b64decode(str(signatures.get(path.name, "")))
        key.verify(signature, path.read_bytes(), scheme, hashes.SHA256())
    except (ValueError, InvalidSignature):
        return False
    return True


@check("kit.process")
def kit_process(kit: Kit) -> Iterator[Check]:
    """Whether FLARE runs already with this kit: good to know, and nothing wrong."""
    if kit.role is ADMIN:
        return
    running = running_process(kit)
    if running:
        what = f"FLARE is running with this kit (process {running})"
    else:
        what = "FLARE is not running with this kit"
    yield ok("kit.process", what, process=running)


def running_process(kit: Kit) -> int | None:
    """The process that start.sh wrote down, if it is there."""
    workspace = Path(os.environ.get("NVFL_WORKSPACE") or kit.folder)
    for name in ("pid.fl", "daemon_pid.fl"):
        try:
            number = int((workspace / name).read_text(encoding="ascii"))
        except (OSError, ValueError):
            continue
        if psutil.pid_exists(number):
            return number
    return None
