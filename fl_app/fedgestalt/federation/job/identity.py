"""Who said it: statements that sites sign with the certificates of their FLARE startup kits.

TLS ends at the server, so it tells a site nothing about another site. A signature does: a site
signs with the key of its own kit, and whoever reads the statement checks the certificate against
the root certificate in *their* kit.

What tells a site's certificate from the others that the same root has issued:

- ``nvflare cert approve`` writes a role into every certificate: ``client``, ``server``, or that of
  an administrator. A site's is ``client``;
- ``nvflare provision`` writes none but administrators' roles. A site's certificate then looks like
  the server's, but for the name. So a certificate without a role must not name the server, as the
  kit's start file calls it. A relay's cannot be told apart: our consortia have none.

Not checked here: revocation. Only the server has the list, see ``server/revocation.py``.

TLS and FLARE sign with the same key. FLARE's own signatures have longer salts, and are not accepted
here; but FLARE would accept these. So a statement must begin with words that say what it is for.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedgestalt.errors import PeerError, SiteError

CERTIFICATE_LIMIT: Final = 16 * 1024
SIGNATURE_LIMIT: Final = 1024
"""Bytes; that of the longest RSA key allowed."""

_CERTIFICATE, _KEY, _ROOT = "client.crt", "client.key", "rootCA.pem"
_SERVER_NAMED: Final = (("fed_client.json", "identity"), ("fed_server.json", "admin_server"))
"""Start files of sites and servers, and where in an entry of ``servers`` the server's name is."""

_SITE_ROLE: Final = "client"
_RSA_BITS: Final = range(2048, 8 * SIGNATURE_LIMIT + 1)
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_KEYS: Final = "RSA of 2048 to 8192 bits, ECDSA on P-256, P-384 or P-521, or Ed25519"
_FILE_LIMIT: Final = 1024 * 1024
_SHOWN: Final = 64
_EPHEMERAL: Final = timedelta(days=365)

_LEAD: Final = "the consortium's lead"
_UNPACK: Final = f"unpack the kit again, or ask {_LEAD} for it"
_NEW_KIT: Final = f"ask {_LEAD} for a new kit"
_TAG = b"fedgestalt statement/1|"
_DAMAGED: Final = "every site must send the certificate of its kit, unchanged, and nothing else"

_PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
_PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
_Extension = TypeVar("_Extension", bound=x509.ExtensionType)

_MALFORMED: Final = (
    *(ValueError, TypeError, UnsupportedAlgorithm, Warning),
    *(x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)
"""What reading a certificate raises; warnings where the interpreter makes errors of them."""


class _UnfitError(Exception):
    """A certificate is not acceptable; whose fault that is, the caller knows."""

    def __init__(self, what: str, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what, self.remedy = what, remedy


@dataclass(frozen=True, eq=False)
class Identity:
    """A site's own.

    Attributes:
        name: the site's.
        certificate: PEM, exactly one.
    """

    name: str
    certificate: bytes = field(repr=False)
    _key: _PrivateKey = field(repr=False)

    def sign(self, statement: bytes) -> bytes:
        """RSA-PSS-SHA256 with a salt as long as the digest, ECDSA-SHA256 or Ed25519, by key.

        TLS and FLARE sign with the same key; a tag before the statement keeps ours apart.
        """
        statement = _TAG + statement
        match self._key:
            case rsa.RSAPrivateKey():
                return self._key.sign(statement, _pss(), hashes.SHA256())
            case ec.EllipticCurvePrivateKey():
                return self._key.sign(statement, ec.ECDSA(hashes.SHA256()))
            case _:
                return self._key.sign(statement)


@dataclass(frozen=True)
class PublicIdentity:
    """Another site's; only :meth:`Trust.check` makes one.

    Attributes:
        site: its name.
        fingerprint: SHA-256 of its certificate in DER, 32 bytes.
    """

    site: str
    fingerprint: bytes
    _key: _PublicKey = field(repr=False, compare=False)

    def verify(self, statement: bytes, signature: bytes) -> None:
        """Raise PeerError unless the site signed exactly this statement."""
        if len(signature) > SIGNATURE_LIMIT:
            raise PeerError(
                f"its signature has {len(signature)} bytes, and at most {SIGNATURE_LIMIT} are"
                " allowed",
                site=self.site,
                remedy="all sites must run the same version",
            )
        statement = _TAG + statement
        try:
            match self._key:
                case rsa.RSAPublicKey():
                    self._key.verify(signature, statement, _pss(), hashes.SHA256())
                case ec.EllipticCurvePublicKey():
                    self._key.verify(signature, statement, ec.ECDSA(hashes.SHA256()))
                case _:
                    self._key.verify(signature, statement)
        except InvalidSignature:
            raise PeerError(
                "its signature does not fit: the statement was changed on the way, or somebody"
                f" without the key of certificate {self.fingerprint.hex()} signed",
                site=self.site,
                remedy=f"tell {_LEAD}; submit the job again only when the cause is known",
            ) from None


@dataclass(frozen=True)
class Trust:
    """Whom a party believes; made by one of the three class methods."""

    _root: x509.Certificate | None
    _servers: frozenset[str] = frozenset()

    @classmethod
    def from_kit(cls, startup: Path) -> Trust:
        """Whom the root of a site's or server's kit has certified as a site; raises SiteError."""
        root = _read(startup, _ROOT, CERTIFICATE_LIMIT)
        return cls.from_root(root, servers=_server_names(startup))

    @classmethod
    def from_root(cls, pem: bytes, *, servers: Collection[str] = ()) -> Trust:
        """Whom this root certificate has certified as a site; raises SiteError.

        Args:
            pem: the root certificate.
            servers: names that no site can have, see the module docstring.
        """
        try:
            root = _load(pem, _UNPACK)
            contents = _Contents.of(root)
            _check_key(contents.key)
        except _UnfitError as error:
            raise SiteError(error.what, where=_ROOT, remedy=error.remedy) from None
        if not contents.issues:
            raise SiteError(
                f"the certificate of {_quoted(contents.names)} is not one that issues others",
                where=_ROOT,
                remedy=_UNPACK,
            )
        return cls(root, frozenset(servers))

    @classmethod
    def of_anybody(cls) -> Trust:
        """Everybody who signed their certificate themselves: for simulations, proves nothing."""
        return cls(None)

    def check(self, site: str, certificate: bytes, now: datetime | None) -> PublicIdentity:
        """Accept a certificate as that of ``site``.

        Args:
            site: whose it should be.
            certificate: PEM, exactly as in :attr:`Identity.certificate`.
            now: aware; None if the time does not matter. For what was signed in the past, then.

        Raises:
            PeerError: it is not acceptable.
        """
        try:
            loaded = _load(certificate, _DAMAGED)
            if not _is_canonical(loaded, certificate):
                what = "there is something beside one certificate in PEM, or it is not written so"
                raise _UnfitError(what, _DAMAGED)
            contents = self._accept(loaded, now)
            if contents.names != [site]:
                raise _UnfitError(
                    f"the certificate is made out to {_quoted(contents.names)}, not to {site!r}",
                    "a site must sign with its own startup kit, under the name in it",
                )
            key = _check_key(contents.key)
        except _UnfitError as error:
            raise PeerError(error.what, site=site, remedy=error.remedy) from None
        return PublicIdentity(site, loaded.fingerprint(hashes.SHA256()), key)

    def _accept(self, certificate: x509.Certificate, now: datetime | None) -> _Contents:
        """Check all but name and key."""
        contents = _Contents.of(certificate)
        _check_issuer(certificate, contents, self._root)
        if contents.issues:
            what = "the certificate is one that issues others, not that of a site"
            raise _UnfitError(what, "a site must sign with its startup kit")
        if not set(contents.roles) <= {_SITE_ROLE}:
            what = f"the certificate is that of a {_quoted(contents.roles)}, not of a site"
            raise _UnfitError(what, "a site must sign with its own startup kit")
        if not contents.roles and (named := self._servers.intersection(contents.names)):
            what = f"the certificate is that of the server {_quoted(sorted(named))}, not of a site"
            raise _UnfitError(what, "the server cannot take part as a site")
        if not contents.signs:
            what = "the certificate is not for signatures of a client, by its key usage"
            raise _UnfitError(what, _NEW_KIT)
        if now is not None:
            _check_dates("the certificate", certificate, now)
            _check_dates("the root certificate", self._root or certificate, now)
        return contents


def kit_identity(startup: Path) -> Identity:
    """The identity in a site's startup kit.

    Args:
        startup: the folder with ``client.crt``, ``client.key`` and ``rootCA.pem``.

    Raises:
        SiteError: the kit is incomplete, expired, not a site's, or its files do not belong
            together.
    """
    pem, key = _read(startup, _CERTIFICATE, CERTIFICATE_LIMIT), _private_key(startup)
    trust = Trust.from_kit(startup)
    try:
        certificate = _load(pem, _UNPACK)
        contents = trust._accept(certificate, datetime.now(UTC))
        if len(contents.names) != 1:
            what = f"the certificate is made out to {_quoted(contents.names)}, not to one site"
            raise _UnfitError(what, _NEW_KIT)
        public = _check_key(contents.key)
    except _UnfitError as error:
        raise SiteError(error.what, where=_CERTIFICATE, remedy=error.remedy) from None
    if key.public_key() != public:
        raise SiteError(
            f"{_KEY} does not belong to {_CERTIFICATE}",
            where="startup kit",
            remedy=f"{_UNPACK}; files of two kits may have been mixed",
        )
    (name,) = contents.names
    return Identity(name, certificate.public_bytes(serialization.Encoding.PEM), key)


def ephemeral_identity(name: str) -> Identity:
    """An identity for a simulated site, which proves nothing and is never written down."""
    key, now = ed25519.Ed25519PrivateKey.generate(), datetime.now(UTC)
    try:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    except ValueError:
        what = f"the site's name has {len(name)} characters, and a certificate takes 1 to 64"
        raise SiteError(what, remedy="name the site otherwise") from None
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + _EPHEMERAL)
        .sign(key, None)
    )
    return Identity(name, certificate.public_bytes(serialization.Encoding.PEM), key)


def fingerprint_of(certificate: bytes) -> bytes:
    """SHA-256 of a certificate's DER, 32 bytes; raises SiteError if there is not exactly one."""
    try:
        return _load(certificate, _DAMAGED).fingerprint(hashes.SHA256())
    except _UnfitError as error:
        raise SiteError(error.what, remedy=error.remedy) from None


@dataclass(frozen=True)
class _Contents:
    """What a certificate says.

    Attributes:
        names: common names of its subject.
        roles: FLARE's, of its subject.
        issuer: common names of its issuer.
        key: of any kind.
        issues: whether it may issue certificates.
        signs: whether its uses include signatures of a client; so if none are named.
    """

    names: list[str]
    roles: list[str]
    issuer: list[str]
    key: object
    issues: bool
    signs: bool

    @classmethod
    def of(cls, certificate: x509.Certificate) -> _Contents:
        try:
            basic = _extension(certificate, x509.BasicConstraints)
            usage = _extension(certificate, x509.KeyUsage)
            extended = _extension(certificate, x509.ExtendedKeyUsage)
            return cls(
                names=_values(certificate.subject, NameOID.COMMON_NAME),
                roles=_values(certificate.subject, NameOID.UNSTRUCTURED_NAME),
                issuer=_values(certificate.issuer, NameOID.COMMON_NAME),
                key=certificate.public_key(),
                issues=bool((basic and basic.ca) or (usage and usage.key_cert_sign)),
                signs=(usage is None or usage.digital_signature)
                and (extended is None or ExtendedKeyUsageOID.CLIENT_AUTH in extended),
            )
        except _MALFORMED:
            what = "the certificate holds something that cannot be read, or a kind of key unknown"
            raise _UnfitError(what, _NEW_KIT) from None


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _values(name: x509.Name, oid: x509.ObjectIdentifier) -> list[str]:
    return [str(attribute.value) for attribute in name.get_attributes_for_oid(oid)]


def _load(pem: bytes, remedy: str) -> x509.Certificate:
    """The one certificate in ``pem``."""
    if len(pem) > CERTIFICATE_LIMIT:
        what = f"the certificate is longer than {CERTIFICATE_LIMIT} bytes"
        raise _UnfitError(what, remedy)
    try:
        certificates = x509.load_pem_x509_certificates(pem)
    except _MALFORMED:
        what = f"{len(pem)} bytes are no certificate in PEM, or a damaged one"
        raise _UnfitError(what, remedy) from None
    if len(certificates) != 1:
        what = f"there are {len(certificates)} certificates, and exactly one is expected"
        raise _UnfitError(what, remedy)
    return certificates[0]


def _is_canonical(certificate: x509.Certificate, pem: bytes) -> bool:
    """Whether ``pem`` is the one way to write it: nobody else can give it another fingerprint.

    The issuer's signature does not cover the octet before it, which counts unused bits. (An ECDSA
    signature has a twin as well; FLARE's roots are RSA.)
    """
    der = certificate.public_bytes(serialization.Encoding.DER)
    written = certificate.public_bytes(serialization.Encoding.PEM)
    return pem == written and der.endswith(b"\0" + certificate.signature)


def _check_issuer(
    certificate: x509.Certificate, contents: _Contents, root: x509.Certificate | None
) -> None:
    try:
        certificate.verify_directly_issued_by(root or certificate)
    except (*_MALFORMED, InvalidSignature):
        if root is None:
            what = "the certificate was not signed by its own key, as in a simulation"
            raise _UnfitError(what, "sites of a simulation trust no real kits") from None
        expected = _values(root.subject, NameOID.COMMON_NAME)
        if contents.issuer == expected:
            what = f"the certificate names the root {_quoted(expected)} without its valid signature"
        else:
            issuer = _quoted(contents.issuer)
            what = f"the certificate was issued by {issuer}, not by the root {_quoted(expected)}"
        remedy = f"everybody needs a kit of one consortium: compare fingerprints of {_ROOT}"
        raise _UnfitError(what, remedy) from None


def _check_key(key: object) -> _PublicKey:
    kind = "of another kind"
    match key:
        case rsa.RSAPublicKey():
            if key.key_size in _RSA_BITS:
                return key
            kind = f"RSA of {key.key_size} bits"
        case ec.EllipticCurvePublicKey():
            if isinstance(key.curve, _CURVES):
                return key
            kind = f"ECDSA on {key.curve.name}"
        case ed25519.Ed25519PublicKey():
            return key
    raise _UnfitError(f"the certificate's key is {kind}, and must be {_KEYS}", _NEW_KIT)


def _check_dates(which: str, certificate: x509.Certificate, now: datetime) -> None:
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now > ends:
        what = f"{which} ended {_span(now - ends)} ago, on {_time(ends)}"
        remedy = f"check the clock (NTP); if it is right, {_NEW_KIT}"
    elif now < begins:
        what = f"{which} begins in {_span(begins - now)}, on {_time(begins)}"
        remedy = "set the clocks of all machines (NTP), and wait for that time if they are right"
    else:
        return
    raise _UnfitError(f"{what}, if it is now {_time(now)}", remedy)


def _span(span: timedelta) -> str:
    seconds = span.total_seconds()
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds // length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _quoted(texts: list[str]) -> str:
    """Texts of a certificate, which may be anything, for a sentence."""
    return " and ".join(repr(text[:_SHOWN]) for text in texts[:2]) or "nobody"


def _pss() -> padding.PSS:
    return padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.DIGEST_LENGTH)


def _read(startup: Path, name: str, limit: int) -> bytes:
    """A file of the kit, of at most ``limit`` bytes."""
    try:
        with (startup / name).open("rb") as file:
            content = file.read(limit + 1)
        if len(content) <= limit:
            return content
        what = f"{name} is longer than {limit} bytes"
    except FileNotFoundError:
        what = f"{name} is missing"
    except OSError as error:
        what = f"{name} cannot be read ({error.strerror})"
    raise SiteError(what, where="startup kit", remedy=_UNPACK)


def _private_key(startup: Path) -> _PrivateKey:
    pem = _read(startup, _KEY, CERTIFICATE_LIMIT)
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except _MALFORMED:
        key = None
    if not isinstance(key, _PrivateKey):
        raise SiteError(
            f"{_KEY} is not an unencrypted private key in PEM, of RSA, ECDSA or Ed25519",
            where="startup kit",
            remedy=_UNPACK,
        )
    return key


def _server_names(startup: Path) -> set[str]:
    """What a kit calls the server; nothing if it has no start file."""
    names: set[str] = set()
    for name, place in _SERVER_NAMED:
        if not (startup / name).exists():
            continue
        try:
            content = json.loads(_read(startup, name, _FILE_LIMIT))
            names |= {str(server.get(place, "")) for server in content["servers"]}
        except (ValueError, LookupError, TypeError, AttributeError):
            what = f"{name} does not list the servers"
            raise SiteError(what, where="startup kit", remedy=_UNPACK) from None
    return names
