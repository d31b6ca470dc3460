"""The way to the server: name, port, TLS both ways, and what answers.

A site dials one port of the server and nothing else. The steps are those that FLARE's transport
takes, one at a time, so that what fails can be told apart: the name service, a firewall, a program
that is not ours, a proxy that opens TLS, or a certificate that one side does not take.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from cryptography import x509

from fedgestalt.doctor.findings import (
    LEAD,
    Check,
    NotCheckedError,
    check,
    not_checked,
    ok,
    problem,
    warning,
)
from fedgestalt.doctor.kit import Endpoint, Kit, common_name

SECONDS: Final = 5.0
"""To wait for each answer of the network."""

_PATIENCE: Final = 1.0
"""To wait for a server that speaks first, as gRPC's does."""

_CUSTOM_ROOT: Final = "customRootCA.pem"
_FIREWALL: Final = "ask the network team to open this port outwards"
_INSPECTION: Final = (
    "ask the network team to exempt this server from TLS inspection, or find out what answers there"
)
_ASK: Final = f"ask {LEAD} whether the server runs and where"
_MIXED: Final = f"ask {LEAD} for a new kit of this site or of the server"

# What a client of HTTP/2 says first (RFC 9113, 3.4): a magic line and an empty SETTINGS frame.
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_FRAME_HEAD, _SETTINGS = 9, 4

# X509_V_ERR_* of OpenSSL.
_NOT_YET, _EXPIRED, _WRONG_NAME, _WRONG_ADDRESS = 9, 10, 62, 64
_NO_TLS: Final = (
    *("WRONG_VERSION_NUMBER", "UNKNOWN_PROTOCOL", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"),
    *("RECORD_LAYER_FAILURE", "UNEXPECTED_MESSAGE", "UNEXPECTED_RECORD", "BAD_RECORD_TYPE"),
)
_OURS_REFUSED: Final = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")


@dataclass(frozen=True)
class Dialled:
    """An open connection to the server.

    Attributes:
        stream: connected; closed by whoever asked for it.
        milliseconds: one round trip, by the time it took to connect.
    """

    stream: socket.socket
    milliseconds: float


def network(kit: Kit, trusted: bool, now: datetime) -> list[Check]:
    """All checks of the way from this kit to its server, up to the first that fails.

    Args:
        trusted: whether the kit's own certificate and key were found in order.
        now: to compare certificates with.
    """
    try:
        kit.endpoint()
    except NotCheckedError as fault:
        return not_checked("network.name", str(fault))
    found = [*proxy(kit, os.environ), *name(kit)]
    if _failed(found):
        return found + not_checked("network.port", "the server's name does not resolve")
    found += port(kit)
    if _failed(found):
        return found + not_checked("network.tls", "the server's port was not reached")
    if not trusted:
        reason = "the kit's own certificate or key is not in order"
        return found + not_checked("network.tls", reason)
    return found + tls(kit, now)


def _failed(found: list[Check]) -> bool:
    return found[-1].state in ("problem", "skipped")


@check("network.proxy")
def proxy(kit: Kit, environment: Mapping[str, str]) -> Iterator[Check]:
    """FLARE would go the same way as these checks, not through a proxy.

    gRPC obeys these variables; see "gRPC environment variables" in its documentation.
    """
    endpoint = kit.endpoint()
    if not endpoint.speaks_grpc:
        return
    chosen = [v for v in ("grpc_proxy", "https_proxy", "http_proxy") if environment.get(v)]
    spared = environment.get("no_grpc_proxy") or environment.get("no_proxy") or ""
    ends = [entry.strip().lstrip("*") for entry in spared.split(",") if entry.strip()]
    if chosen and not any(endpoint.host.endswith(end) for end in ends):
        what = (
            f"{chosen[0]} is set, so FLARE would go through that proxy; here the server was"
            " tried directly"
        )
        remedy = f"start FLARE with no_proxy={endpoint.host} unless the proxy is meant"
        yield warning("network.proxy", what, remedy, variable=chosen[0])


@check("network.name")
def name(kit: Kit) -> Iterator[Check]:
    """The server's name leads to an address."""
    endpoint = kit.endpoint()
    addresses, fault = _resolve(endpoint)
    if fault:
        what = f"the server's name {endpoint.host!r} does not resolve ({fault})"
        remedy = f"ask the network team to let this machine resolve it, or {_ASK}"
        yield problem("network.name", what, remedy, host=endpoint.host)
    else:
        shown = ", ".join(addresses)
        what = f"{endpoint.host} is {shown}" if shown != endpoint.host else f"address {shown}"
        yield ok("network.name", what, host=endpoint.host, addresses=addresses)


def _resolve(endpoint: Endpoint) -> tuple[list[str], str]:
    """Addresses, each once, or why there are none; the name service has no time limit itself."""
    answer: list[str] = []
    fault = [f"no answer within {SECONDS:.0f} s"]

    def ask() -> None:
        try:
            found = socket.getaddrinfo(endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
            answer.extend(dict.fromkeys(str(entry[4][0]) for entry in found))
            fault[0] = ""
        except (OSError, UnicodeError) as error:
            fault[0] = getattr(error, "strerror", None) or "not a name"

    worker = threading.Thread(target=ask, daemon=True)
    worker.start()
    worker.join(SECONDS)
    return list(answer), fault[0]


@check("network.port")
def port(kit: Kit) -> Iterator[Check]:
    """The port is open; how far away it is."""
    endpoint = kit.endpoint()
    try:
        dialled = _dial(endpoint)
        dialled.stream.close()
        milliseconds = round(dialled.milliseconds, 1)
        what = f"{endpoint} is open, {milliseconds:g} ms away"
        yield ok("network.port", what, port=endpoint.port, round_trip_ms=milliseconds)
    except TimeoutError:
        what = f"{endpoint} does not answer within {SECONDS:.0f} s: a firewall probably blocks it"
        yield problem("network.port", what, f"{_FIREWALL}, or {_ASK}", port=endpoint.port)
    except ConnectionRefusedError:
        what = f"{endpoint} refuses connections: no server listens there, or a firewall refuses"
        yield problem("network.port", what, f"{_ASK}, then {_FIREWALL}", port=endpoint.port)
    except OSError as error:
        what = f"{endpoint} cannot be reached ({error.strerror or type(error).__name__})"
        yield problem("network.port", what, f"{_FIREWALL}, or {_ASK}", port=endpoint.port)


def _dial(endpoint: Endpoint) -> Dialled:
    """Connect to the first address of the server that answers; raises OSError."""
    fault: OSError = ConnectionError("no address")
    for family, kind, protocol, _, address in socket.getaddrinfo(
        endpoint.host, endpoint.port, type=socket.SOCK_STREAM
    ):
        stream = socket.socket(family, kind, protocol)
        stream.settimeout(SECONDS)
        started = time.perf_counter()
        try:
            stream.connect(address)
        except OSError as error:
            stream.close()
            fault = error
            continue
        return Dialled(stream, (time.perf_counter() - started) * 1000)
    raise fault


@check("network.tls")
def tls(kit: Kit, now: datetime) -> Iterator[Check]:
    """It is our server that answers, and it takes our certificate."""
    endpoint = kit.endpoint()
    if endpoint.security == "clear":
        what = "the kit connects without TLS, so anybody on the way can read and change messages"
        yield problem("network.tls", what, f"ask {LEAD} for a kit with connection_security mtls")
        return
    context = _context(kit, endpoint)
    with _dial(endpoint).stream as bare:
        try:
            with context.wrap_socket(bare, server_hostname=endpoint.host) as stream:
                yield from _after_handshake(stream, endpoint)
        except ssl.SSLCertVerificationError as error:
            yield _distrusted(error, endpoint, kit, now)
        except TimeoutError:
            what = f"{endpoint} takes connections, but does not answer TLS in {SECONDS:.0f} s"
            yield problem("network.tls", what, f"{_ASK}; a firewall or proxy may hold messages")
        except ssl.SSLError as error:
            yield _no_handshake(error, endpoint)
        except OSError:
            yield _cut(endpoint)


def _context(kit: Kit, endpoint: Endpoint) -> ssl.SSLContext:
    """As FLARE connects: TLS 1.2 or newer, the consortium's authority alone, our certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    custom = kit.startup(_CUSTOM_ROOT)
    one_way = endpoint.security == "tls"
    context.load_verify_locations(custom if one_way and custom.exists() else kit.root)
    if not one_way:
        context.load_cert_chain(kit.certificate, kit.key)
    if endpoint.speaks_grpc:
        context.set_alpn_protocols(["h2"])
    return context


def _after_handshake(stream: ssl.SSLSocket, endpoint: Endpoint) -> Iterator[Check]:
    held = stream.getpeercert(binary_form=True)
    found = common_name(x509.load_der_x509_certificate(held)) if held else ""
    if endpoint.identity and endpoint.security == "mtls" and found != endpoint.identity:
        what = f"the server is {found!r}, the kit expects {endpoint.identity!r}"
        yield problem("network.tls", what, _MIXED, server=found)
        return
    version = (stream.version() or "TLS").replace("TLSv", "TLS ")
    what = f"{version}, and the server's certificate is of this consortium and for this name"
    yield ok("network.tls", what, server=found, tls=version)
    if endpoint.security == "tls":
        what = "the connection shows the server no certificate of this site (one-way TLS)"
        remedy = f"ask {LEAD} whether a proxy before the server is meant, else for a kit with mtls"
        yield warning("network.accepted", what, remedy)
        return
    yield _answer(stream, endpoint)


def _answer(stream: ssl.SSLSocket, endpoint: Endpoint) -> Check:
    """What follows the handshake: in TLS 1.3 a refusal of our certificate shows only now."""
    if endpoint.speaks_grpc and stream.selected_alpn_protocol() != "h2":
        what = "a server of this consortium answers, but not in gRPC (it chose no HTTP/2)"
        return problem("network.accepted", what, _ASK)
    try:
        said = _first_words(stream, endpoint)
    except TimeoutError:
        if not endpoint.speaks_grpc:
            return ok("network.accepted", "the server takes our certificate")
        what = "TLS works, but no gRPC server answers behind it"
        return problem("network.accepted", what, f"{_ASK}; it may be starting or overloaded")
    except ssl.SSLError as error:
        if _refuses_us(error):
            return _refused(f"TLS alert {_alert(error)}")
        if not isinstance(error, ssl.SSLEOFError):
            what = f"the server ends the connection ({_alert(error)})"
            return problem("network.accepted", what, _ASK)
        said = b""
    except OSError:
        said = b""
    if not said:
        return _refused("it closed the connection once it had seen it")
    if endpoint.speaks_grpc and (len(said) < 4 or said[3] != _SETTINGS):
        return problem("network.accepted", "TLS works, but what answers is no gRPC server", _ASK)
    return ok("network.accepted", "the server takes our certificate and answers")


def _first_words(stream: ssl.SSLSocket, endpoint: Endpoint) -> bytes:
    """What the server says first; a greeting of ours could cost us the reason of a refusal."""
    stream.settimeout(_PATIENCE)
    try:
        return stream.recv(_FRAME_HEAD)
    except TimeoutError:
        if not endpoint.speaks_grpc:
            raise
    stream.settimeout(SECONDS)
    stream.sendall(_PREFACE)
    return stream.recv(_FRAME_HEAD)


def _refused(how: str) -> Check:
    what = f"the server does not take this kit's certificate ({how})"
    return problem("network.accepted", what, f"{_MIXED}; it may have been issued anew or revoked")


def _refuses_us(error: ssl.SSLError) -> bool:
    reason = error.reason or ""
    return "ALERT" in reason and any(word in reason for word in _OURS_REFUSED)


def _alert(error: ssl.SSLError) -> str:
    return (error.reason or type(error).__name__).rpartition("ALERT_")[2].replace("_", " ").lower()


def _no_handshake(error: ssl.SSLError, endpoint: Endpoint) -> Check:
    if _refuses_us(error):
        return _refused(f"TLS alert {_alert(error)}")
    if error.reason in _NO_TLS:
        what = f"something answers at {endpoint} that does not speak TLS: not our server"
        return problem("network.tls", what, f"{_ASK}; a proxy or another service may be there")
    if isinstance(error, ssl.SSLEOFError):
        return _cut(endpoint)
    what = f"the TLS handshake with {endpoint} fails ({_alert(error)})"
    return problem("network.tls", what, f"{_ASK}; something else may answer there")


def _cut(endpoint: Endpoint) -> Check:
    what = f"{endpoint} closes the connection in the TLS handshake: a firewall, or not our server"
    return problem("network.tls", what, f"{_FIREWALL}, or {_ASK}")


def _distrusted(
    error: ssl.SSLCertVerificationError, endpoint: Endpoint, kit: Kit, now: datetime
) -> Check:
    """Say why the server's certificate does not count, from a second look at it."""
    shown = _look(endpoint, kit)
    figures: dict[str, Any] = {"verify_code": error.verify_code}
    if shown:
        figures |= {"server": common_name(shown), "issuer": shown.issuer.rfc4514_string()}
    what, remedy = _reason(error, endpoint, shown, now)
    return problem("network.tls", what, remedy, **figures)


def _reason(
    error: ssl.SSLCertVerificationError,
    endpoint: Endpoint,
    shown: x509.Certificate | None,
    now: datetime,
) -> tuple[str, str]:
    if error.verify_code in (_WRONG_NAME, _WRONG_ADDRESS):
        named = f", it is that of {common_name(shown)!r}" if shown else ""
        what = f"the server's certificate is not for the name {endpoint.host!r}{named}"
        return what, f"ask {LEAD} by which name sites must call the server"
    if error.verify_code == _EXPIRED:
        ended = f" on {shown.not_valid_after_utc:%Y-%m-%d}" if shown else ""
        what = f"the server's certificate expired{ended}; this machine's clock says {now:%Y-%m-%d}"
        return what, f"check the clock here (NTP); if it is right, ask {LEAD} to renew the server's"
    if error.verify_code == _NOT_YET:
        begins = f" before {shown.not_valid_before_utc:%Y-%m-%d %H:%M} UTC" if shown else ""
        what = (
            f"the server's certificate is not valid{begins};"
            f" this machine's clock says {now:%Y-%m-%d %H:%M}"
        )
        return what, "set the clock (NTP), which is probably behind"
    issuer = f" but by {shown.issuer.rfc4514_string()!r}" if shown else ""
    what = f"what answers at {endpoint} has no certificate of this consortium{issuer}"
    return f"{what}: TLS is probably intercepted on the way", _INSPECTION


def _look(endpoint: Endpoint, kit: Kit | None) -> x509.Certificate | None:
    """The certificate that is shown at ``endpoint``, unverified; None if none is."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        if kit is not None:
            context.load_cert_chain(kit.certificate, kit.key)
        with (
            _dial(endpoint).stream as bare,
            context.wrap_socket(bare, server_hostname=endpoint.host) as stream,
        ):
            held = stream.getpeercert(binary_form=True)
    except OSError:
        return None
    return x509.load_der_x509_certificate(held) if held else None


@check("network.listen")
def listen(kit: Kit) -> Iterator[Check]:
    """At a server: its ports can be had, or it has them already."""
    endpoint = kit.endpoint()
    server = kit.start()["servers"][0]
    ports = {endpoint.port, int(server.get("admin_port") or endpoint.port)}
    for number in sorted(ports):
        yield _listening(kit, number)


def _listening(kit: Kit, number: int) -> Check:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("", number))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return _taken(kit, number)
        what = f"port {number} cannot be had ({error.strerror})"
        remedy = "run the server as a user who may use it, or ask for a port of 1024 or more"
        return problem("network.listen", what, remedy, port=number)
    what = f"port {number} is free; sites must be able to reach it from outside"
    return ok("network.listen", what, port=number)


def _taken(kit: Kit, number: int) -> Check:
    here = Endpoint("localhost", number, "grpc", "mtls", "")
    shown = _look(here, kit)
    if shown and shown == _own(kit.certificate):
        what = f"this server is running already and listens at port {number}"
        return ok("network.listen", what, port=number, running=True)
    what = f"port {number} is taken by another program"
    remedy = f"find it with `ss -ltnp 'sport = :{number}'` and stop it, or change the port"
    return problem("network.listen", what, remedy, port=number)


def _own(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        raise NotCheckedError("the kit's certificate cannot be read") from None
