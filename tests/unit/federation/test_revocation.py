"""Revoked certificates come in nowhere: by connection, by registration, by login."""

from __future__ import annotations

import datetime as dt
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import UnsafeComponentError
from nvflare.apis.shareable import Shareable
from nvflare.fuel.f3.cellnet.defs import (
    CellChannel,
    CellChannelTopic,
    IdentityChallengeKey,
    MessageHeaderKey,
    ReturnCode,
)
from nvflare.fuel.f3.comm_error import CommError
from nvflare.fuel.f3.connection import ConnState
from nvflare.fuel.f3.drivers.connector_info import Mode
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.message import Message

from fedgestalt.errors import ConfigError
from fedgestalt.federation.server.revocation import (
    LIST_FILE,
    Presented,
    RevokedCertificates,
    read_revoked,
)


def certificate(name: str) -> bytes:
    """A certificate made out to ``name``; each has a key of its own."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = dt.datetime.now(dt.UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    return built.public_bytes(serialization.Encoding.PEM)


def fingerprint(pem: bytes) -> str:
    """As openssl prints it."""
    digest = x509.load_pem_x509_certificate(pem).fingerprint(hashes.SHA256())
    return "sha256 Fingerprint=" + digest.hex(":").upper()


BONN, NEW_BONN, BERLIN, ADMIN = map(certificate, ("bonn", "bonn", "berlin", "lead@example.org"))


class Connection:
    """A connection of FLARE's gRPC driver, as far as anybody looks at it."""

    def __init__(self, name: str, pem: bytes | None) -> None:
        self.name, self.state, self.closed = name, ConnState.IDLE, False
        shown = {"x509_pem_cert": [pem]} if pem else {}
        self.context = SimpleNamespace(auth_context=lambda: shown)

    def close(self) -> None:
        self.closed = True


class Driver:
    """FLARE's BaseDriver: reports each connection to its monitor."""

    def __init__(self, *open_already: Connection) -> None:
        self.connections = {c.name: c for c in open_already}
        self.conn_lock = threading.Lock()
        self.monitor: Any = None

    def register_conn_monitor(self, monitor: Any) -> None:
        self.monitor = monitor

    def report(self, connection: Connection, state: ConnState) -> None:
        connection.state = state
        self.monitor.state_change(connection)


@dataclass
class Server:
    """FLARE's server: a listener, FLARE's connection manager, and registered sites."""

    driver: Driver
    local: Path
    secure: bool = True
    heard: list[tuple[str, ConnState]] = field(default_factory=list)
    sites: dict[str, Any] = field(default_factory=dict)
    filters: list[tuple[str, str, Callable[[Message], Message | None]]] = field(
        default_factory=list
    )

    def __post_init__(self) -> None:
        params = {DriverParams.SCHEME.value: "grpc", DriverParams.SECURE.value: self.secure}
        connector = SimpleNamespace(driver=self.driver, mode=Mode.PASSIVE, params=params)
        manager = SimpleNamespace(
            connectors={"1": connector},
            state_change=lambda connection: self.heard.append((connection.name, connection.state)),
        )
        core_cell = SimpleNamespace(
            communicator=SimpleNamespace(conn_manager=manager),
            add_incoming_request_filter=lambda *entry: self.filters.append(entry),
        )
        self.cell = SimpleNamespace(core_cell=core_cell)
        self.client_manager = SimpleNamespace(get_clients=lambda: self.sites)

    def logout_client(self, token: str) -> None:
        del self.sites[token]

    def fire(self, component: RevokedCertificates, event: str) -> None:
        """FLARE's event, as its server fires it."""
        workspace = SimpleNamespace(get_site_config_dir=lambda: str(self.local))
        context = FLContext()
        context.set_prop(FLContextKey.SITE_OBJ, self, private=True, sticky=False)
        context.set_prop(FLContextKey.WORKSPACE_OBJECT, workspace, private=True, sticky=False)
        for handler, arguments in component.get_event_handlers()[event]:
            handler(event, context, **arguments)


@pytest.fixture
def revoked(tmp_path: Path) -> Path:
    """An empty list."""
    path = tmp_path / LIST_FILE
    path.write_text("# nobody yet\n\n")
    return path


@pytest.fixture
def driver() -> Driver:
    return Driver()


@pytest.fixture
def server(revoked: Path, driver: Driver) -> Server:
    return Server(driver, revoked.parent)


@pytest.fixture
def component(server: Server) -> RevokedCertificates:
    component = RevokedCertificates()
    server.fire(component, EventType.SYSTEM_BOOTSTRAP)
    return component


def revoke(path: Path, pem: bytes) -> None:
    path.write_text(path.read_text() + fingerprint(pem) + "  # stolen\n")


def test_the_list_takes_fingerprints_in_the_forms_in_which_people_have_them(revoked: Path) -> None:
    first, second, third = (fingerprint(pem).partition("=")[2] for pem in (BONN, BERLIN, ADMIN))
    plain = third.replace(":", "").lower()
    revoked.write_text(
        f"# remark\n\nsha256 Fingerprint={first}\nSHA256:{second}  # bonn\n  {plain}\n"
    )
    assert read_revoked(revoked) == {f"SHA256:{one}" for one in (first, second, third)}
    assert Presented.from_pem(BONN) == Presented(f"SHA256:{first}", "bonn")


@pytest.mark.parametrize("line", ["bonn", "SHA256:12:34", "sha1 Fingerprint=" + "AB:" * 19 + "AB"])
def test_a_line_that_is_no_fingerprint_is_named(revoked: Path, line: str) -> None:
    revoked.write_text(f"# remark\n{line}\n")
    with pytest.raises(ConfigError, match="line 2 is no SHA-256 fingerprint"):
        read_revoked(revoked)


def test_a_missing_list_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_revoked(tmp_path / LIST_FILE)


@pytest.mark.usefixtures("component")
def test_a_connection_with_a_revoked_certificate_never_reaches_flare(
    server: Server, driver: Driver, revoked: Path
) -> None:
    revoke(revoked, BONN)
    stranger, friend = Connection("1", BONN), Connection("2", NEW_BONN)
    with pytest.raises(CommError):
        driver.report(stranger, ConnState.CONNECTED)
    driver.report(stranger, ConnState.CLOSED)
    assert server.heard == []
    driver.report(friend, ConnState.CONNECTED)
    driver.report(friend, ConnState.CLOSED)
    assert server.heard == [("2", ConnState.CONNECTED), ("2", ConnState.CLOSED)]


@pytest.mark.usefixtures("component")
@pytest.mark.parametrize("shown", [None, b"no certificate"])
def test_a_connection_that_shows_no_certificate_is_refused(
    server: Server, driver: Driver, shown: bytes | None
) -> None:
    with pytest.raises(CommError):
        driver.report(Connection("1", shown), ConnState.CONNECTED)
    assert server.heard == []


@pytest.mark.parametrize("damage", ["oops\n", None])
def test_while_the_list_cannot_be_read_nobody_new_comes_in_and_nobody_is_thrown_out(
    component: RevokedCertificates,
    server: Server,
    driver: Driver,
    revoked: Path,
    damage: str | None,
) -> None:
    inside, new = Connection("1", BERLIN), Connection("2", NEW_BONN)
    driver.report(inside, ConnState.CONNECTED)
    revoked.unlink() if damage is None else revoked.write_text(damage)
    with pytest.raises(CommError):
        driver.report(new, ConnState.CONNECTED)
    server.fire(component, EventType.CLIENT_HEARTBEAT_PROCESSED)
    assert not inside.closed


def test_connections_end_and_sites_are_logged_out_when_their_certificate_gets_listed(
    component: RevokedCertificates, server: Server, driver: Driver, revoked: Path
) -> None:
    bonn, berlin = Connection("1", BONN), Connection("2", BERLIN)
    server.sites |= {"token-1": SimpleNamespace(name="bonn")}
    server.sites |= {"token-2": SimpleNamespace(name="berlin")}
    for connection in (bonn, berlin):
        driver.report(connection, ConnState.CONNECTED)
    server.fire(component, EventType.CLIENT_HEARTBEAT_PROCESSED)
    assert (bonn.closed, berlin.closed) == (False, False)
    revoke(revoked, BONN)
    server.fire(component, EventType.CLIENT_HEARTBEAT_PROCESSED)
    assert (bonn.closed, berlin.closed) == (True, False)
    assert [site.name for site in server.sites.values()] == ["berlin"]


def test_a_site_that_flare_takes_back_by_its_token_is_logged_out_again(
    component: RevokedCertificates, server: Server, driver: Driver, revoked: Path
) -> None:
    driver.report(Connection("1", BONN), ConnState.CONNECTED)
    revoke(revoked, BONN)
    server.fire(component, EventType.CLIENT_HEARTBEAT_PROCESSED)
    server.sites["token-1"] = SimpleNamespace(name="bonn")
    server.fire(component, EventType.CLIENT_HEARTBEAT_PROCESSED)
    assert server.sites == {}


def test_the_site_with_the_new_certificate_stays_while_the_old_one_is_refused(
    component: RevokedCertificates, server: Server, driver: Driver, revoked: Path
) -> None:
    revoke(revoked, BONN)
    driver.report(Connection("1", NEW_BONN), ConnState.CONNECTED)
    server.sites["token-1"] = SimpleNamespace(name="bonn")
    with pytest.raises(CommError):
        driver.report(Connection("2", BONN), ConnState.CONNECTED)
    server.fire(component, EventType.CLIENT_HEARTBEAT_PROCESSED)
    assert list(server.sites) == ["token-1"]


def test_connections_from_before_the_component_looked_are_checked_too(revoked: Path) -> None:
    revoke(revoked, BONN)
    bonn, berlin = Connection("1", BONN), Connection("2", BERLIN)
    server = Server(Driver(bonn, berlin), revoked.parent)
    component = RevokedCertificates()
    server.fire(component, EventType.SYSTEM_BOOTSTRAP)
    assert (bonn.closed, berlin.closed) == (True, False)
    revoke(revoked, BERLIN)
    server.fire(component, EventType.CLIENT_HEARTBEAT_PROCESSED)
    assert berlin.closed


def registration(pem: Any) -> Message:
    payload = Shareable()
    payload[IdentityChallengeKey.CERT] = pem
    headers = {
        MessageHeaderKey.CHANNEL: CellChannel.SERVER_MAIN,
        MessageHeaderKey.TOPIC: CellChannelTopic.Register,
    }
    return Message(headers, payload)


def login(pem: Any) -> Message:
    return Message({MessageHeaderKey.CHANNEL: CellChannel.HCI, "cert": pem}, "cert_login")


@pytest.mark.parametrize("proof", [registration, login])
def test_a_revoked_certificate_proves_no_identity_over_anybodys_connection(
    component: RevokedCertificates,
    server: Server,
    revoked: Path,
    proof: Callable[[Any], Message],
) -> None:
    revoke(revoked, BONN)
    ((channel, topic, check),) = server.filters
    assert (channel, topic) == ("*", "*"), "a narrower filter would hide FLARE's own"
    for pem in (BONN, BONN + BERLIN, b"no certificate"):
        reply = check(proof(pem))
        assert reply is not None
        assert reply.get_header(MessageHeaderKey.RETURN_CODE) == ReturnCode.UNAUTHENTICATED
    assert check(proof(NEW_BONN)) is None


@pytest.mark.usefixtures("component")
def test_messages_that_prove_no_identity_pass(server: Server, revoked: Path) -> None:
    revoke(revoked, BONN)
    ((_, _, check),) = server.filters
    task = {MessageHeaderKey.CHANNEL: CellChannel.SERVER_COMMAND, MessageHeaderKey.TOPIC: "get"}
    beat = {
        MessageHeaderKey.CHANNEL: CellChannel.SERVER_MAIN,
        MessageHeaderKey.TOPIC: CellChannelTopic.HEART_BEAT,
    }
    command = {MessageHeaderKey.CHANNEL: CellChannel.HCI}
    for headers in (task, beat, command):
        assert check(Message(headers, Shareable())) is None


def test_a_server_whose_list_is_damaged_does_not_start(server: Server, revoked: Path) -> None:
    revoked.write_text("bonn\n")
    with pytest.raises(UnsafeComponentError, match="line 1 is no SHA-256 fingerprint"):
        server.fire(RevokedCertificates(), EventType.SYSTEM_BOOTSTRAP)


def test_a_server_that_asks_for_no_certificates_does_not_start(revoked: Path) -> None:
    server = Server(Driver(), revoked.parent, secure=False)
    with pytest.raises(UnsafeComponentError, match="no listener asks for certificates"):
        server.fire(RevokedCertificates(), EventType.SYSTEM_BOOTSTRAP)
