"""A small hospital to examine: real kits, a real cohort, a real TLS server."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from consortium import tiny_ensemble
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID
from nvflare.lighter.provision import prepare_builders, prepare_project
from nvflare.lighter.provisioner import Provisioner
from rich.console import Console

from fedgestalt.console import Steps
from fedgestalt.doctor import Request, examine
from fedgestalt.doctor.findings import Check
from fedgestalt.hooks.registry import Registry
from fedgestalt.jobs import TrainingJob

SITE, SERVER, ADMIN = "bonn", "localhost", "lead@example.org"
FLARE = "nvflare.lighter.impl"
SETTINGS_FRAME = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)
TINY_JOB = TrainingJob(ensemble=tiny_ensemble())


def provision(workspace: Path) -> Path:
    """Provision a server, two sites and an administrator; returns the folder of the kits."""
    server = {"name": SERVER, "type": "server", "org": "lead", "fed_learn_port": 8002}
    project: dict[str, Any] = {
        "api_version": 3,
        "name": "trial",
        "description": "a consortium of two",
        "participants": [
            server | {"admin_port": 8002},
            *({"name": site, "type": "client", "org": site} for site in (SITE, "berlin")),
            {"name": ADMIN, "type": "admin", "org": "lead", "role": "project_admin"},
        ],
        "builders": [
            {
                "path": f"{FLARE}.workspace.WorkspaceBuilder",
                "args": {"template_file": "master_template.yml"},
            },
            {
                "path": f"{FLARE}.static_file.StaticFileBuilder",
                "args": {"config_folder": "config", "scheme": "grpc"},
            },
            {"path": "fedgestalt_provisioning.FedgestaltPolicyBuilder"},
            {"path": f"{FLARE}.cert.CertBuilder"},
            {"path": f"{FLARE}.signature.SignatureBuilder"},
        ],
    }
    provisioner = Provisioner(str(workspace), prepare_builders(project))
    context = provisioner.provision(prepare_project(project))
    return Path(context.get_result_location())


@dataclass(frozen=True)
class Authority:
    """Who issues certificates."""

    key: rsa.RSAPrivateKey
    certificate: x509.Certificate

    @classmethod
    def of(cls, kits: Path) -> Authority:
        """That of provisioned kits."""
        state = json.loads((kits.parent / "state" / "cert.json").read_text())
        key = serialization.load_pem_private_key(state["root_pri_key"].encode(), None)
        assert isinstance(key, rsa.RSAPrivateKey)
        return cls(key, x509.load_pem_x509_certificate(state["root_cert"].encode()))

    @classmethod
    def foreign(cls) -> Authority:
        """One that nobody here trusts."""
        key = new_key()
        name = _named("somebody else")
        builder = _builder(name, name, key, NOW - DAY, NOW + 300 * DAY)
        builder = builder.add_extension(x509.BasicConstraints(True, None), critical=True)
        return cls(key, builder.sign(key, hashes.SHA256()))

    def issue(
        self,
        key: rsa.RSAPrivateKey,
        name: str,
        *,
        host: str = "",
        begins: datetime = NOW - DAY,
        ends: datetime = NOW + 300 * DAY,
    ) -> bytes:
        """A certificate for ``name``, PEM."""
        builder = _builder(_named(name), self.certificate.subject, key, begins, ends)
        names = x509.SubjectAlternativeName([x509.DNSName(host or name)])
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key())
        builder = builder.add_extension(names, False).add_extension(identifier, False)
        return pem(builder.sign(self.key, hashes.SHA256()))


def new_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(65537, 2048)


def pem(item: rsa.RSAPrivateKey | x509.Certificate) -> bytes:
    if isinstance(item, x509.Certificate):
        return item.public_bytes(serialization.Encoding.PEM)
    return item.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.TraditionalOpenSSL,
        serialization.NoEncryption(),
    )


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(
    subject: x509.Name, issuer: x509.Name, key: rsa.RSAPrivateKey, begins: datetime, ends: datetime
) -> x509.CertificateBuilder:
    builder = x509.CertificateBuilder(subject_name=subject, issuer_name=issuer)
    builder = builder.public_key(key.public_key()).serial_number(x509.random_serial_number())
    return builder.not_valid_before(begins).not_valid_after(ends)


@dataclass
class Endpoint:
    """A listening port of this machine; what it does with a connection is up to its thread."""

    sockets: list[socket.socket] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def open(self, backlog: int = 5) -> socket.socket:
        listener = socket.create_server(("127.0.0.1", 0), backlog=backlog)
        self.sockets.append(listener)
        return listener

    def serve(self, answer: Any) -> int:
        """Call ``answer(stream)`` for every connection; returns the port."""
        listener = self.open()

        def loop() -> None:
            while True:
                try:
                    stream, _ = listener.accept()
                except OSError:  # closed
                    return
                with stream, contextlib.suppress(OSError):
                    stream.settimeout(5)
                    answer(stream)

        thread = threading.Thread(target=loop, daemon=True)
        thread.start()
        self.threads.append(thread)
        return int(listener.getsockname()[1])

    def close(self) -> None:
        for listener in self.sockets:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
        for thread in self.threads:
            thread.join(5)
            assert not thread.is_alive()


def tls_answer(
    certificate: Path,
    key: Path,
    authority: Path,
    *,
    alpn: str = "h2",
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
    says: bytes = SETTINGS_FRAME,
    waits: bool = False,
) -> Any:
    """What FLARE's server does with a connection, up to the first frame."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    context.load_verify_locations(authority)
    context.verify_mode = ssl.CERT_REQUIRED
    context.maximum_version = version
    context.set_alpn_protocols([alpn])

    def answer(stream: socket.socket) -> None:
        with context.wrap_socket(stream, server_side=True) as secure:
            if waits:
                assert secure.recv(24).startswith(b"PRI * HTTP/2.0")
            secure.sendall(says)
            secure.recv(1)

    return answer


@dataclass
class Hospital:
    """One site on disk, and what it connects to."""

    folder: Path
    kits: Path
    kit: Path
    authority: Authority
    endpoint: Endpoint
    job: TrainingJob = TINY_JOB
    registry: Registry | None = None

    @property
    def data(self) -> Path:
        return self.folder / "hospitals" / SITE

    @property
    def store(self) -> Path:
        return self.folder / "store"

    def startup(self, name: str) -> Path:
        return self.kit / "startup" / name

    def local(self, name: str) -> Path:
        return self.kit / "local" / name

    def edit(self, path: Path, **changes: Any) -> None:
        """Change keys at the top of a JSON file."""
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def policy(self, **settings: Any) -> None:
        """Write the site's policy."""
        usual = {"data": str(self.data), "store": str(self.store), "threads": 1}
        self.local("fedgestalt.yaml").write_text(yaml.safe_dump(usual | settings))

    def connect_to(self, port: int, host: str = SERVER) -> None:
        """Let the kit's server be at ``port`` of this machine."""
        path = self.startup("fed_client.json")
        content = json.loads(path.read_text())
        content["servers"][0]["service"]["target"] = f"{host}:{port}"
        path.write_text(json.dumps(content))

    def serve(
        self, certificate: bytes | None = None, key: rsa.RSAPrivateKey | None = None, **how: Any
    ) -> None:
        """Answer as the consortium's server, or with another certificate, at a new port."""
        startup = self.kits / SERVER / "startup"
        files = [startup / "server.crt", startup / "server.key"]
        if certificate and key:
            files = [self.folder / "shown.crt", self.folder / "shown.key"]
            files[0].write_bytes(certificate)
            files[1].write_bytes(pem(key))
        trusted = how.pop("authority", startup / "rootCA.pem")
        self.connect_to(self.endpoint.serve(tls_answer(*files, trusted, **how)))

    def new_certificate(self, **facts: Any) -> None:
        """Give the kit a new certificate and key of the consortium."""
        key = new_key()
        name = facts.pop("name", SITE)
        authority = facts.pop("authority", self.authority)
        self.startup("client.crt").write_bytes(authority.issue(key, name, **facts))
        self.startup("client.key").write_bytes(pem(key))

    def server_kit(self, port: int) -> Path:
        """The kit of the server, at a port of our choice."""
        kit = self.folder / "server"
        shutil.copytree(self.kits / SERVER, kit)
        path = kit / "startup" / "fed_server.json"
        path.write_text(path.read_text().replace("8002", str(port)))
        return kit

    def examined(self, *, dry_run: bool = False) -> list[Check]:
        """What the doctor says."""
        request = Request(self.kit, None, dry_run, self.job, self.registry)
        return examine(request, quiet())


def hospital(folder: Path, kits: Path, data: Path, endpoint: Endpoint) -> Hospital:
    """A site in order, whose server answers."""
    kit = folder / "kit"
    shutil.copytree(kits / SITE, kit)
    (folder / "hospitals").mkdir()
    shutil.copytree(data, folder / "hospitals" / SITE)
    made = Hospital(folder, kits, kit, Authority.of(kits), endpoint)
    made.policy()
    made.serve()
    return made


def free_port() -> int:
    with socket.create_server(("", 0)) as taken:
        return int(taken.getsockname()[1])


def quiet() -> Steps:
    return Steps(Console(quiet=True))


def by_state(checks: list[Check]) -> dict[str, set[str]]:
    """Names of checks by state."""
    found: dict[str, set[str]] = {"ok": set(), "warning": set(), "problem": set(), "skipped": set()}
    for one in checks:
        found[one.state].add(one.name)
    return found


def named(checks: list[Check], name: str) -> Check:
    """The only check called ``name``."""
    (found,) = [one for one in checks if one.name == name]
    return found


@contextlib.contextmanager
def left_alone(*folders: Path) -> Iterator[None]:
    """Fail if something in ``folders`` changes meanwhile."""
    before = [_contents(folder) for folder in folders]
    yield
    assert [_contents(folder) for folder in folders] == before


def _contents(folder: Path) -> list[tuple[str, int]]:
    paths = sorted(folder.rglob("*")) if folder.exists() else []
    return [(str(path), path.stat().st_mtime_ns) for path in paths]
