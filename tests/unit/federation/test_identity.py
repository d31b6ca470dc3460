"""Identities: whose certificate and signature is believed, of FLARE's own kits and of forgeries."""

from __future__ import annotations

import base64
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import (
    dsa,
    ec,
    ed448,
    ed25519,
    padding,
    rsa,
    x25519,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given, settings
from hypothesis import strategies as st
from nvflare.lighter.utils import sign_content, verify_content

from fedgestalt.errors import FedgestaltError, PeerError, SiteError
from fedgestalt.federation.job.identity import (
    CERTIFICATE_LIMIT,
    SIGNATURE_LIMIT,
    Identity,
    PublicIdentity,
    Trust,
    ephemeral_identity,
    fingerprint_of,
    kit_identity,
)

BIN = Path(sys.executable).parent
FLARE = "nvflare.lighter.impl"
SERVER = "server.example.org"
ROLES = ("project_admin", "org_admin", "lead", "member")
NOW = datetime.now(UTC)
DAY = timedelta(days=1)
STATEMENT = b"fedgestalt test statement/1|" + bytes(range(256))
PEM = serialization.Encoding.PEM
NOTHING_SECRET = re.compile(r"(?!.*(PRIVATE KEY|MII[A-Za-z0-9+/]{8}))", re.DOTALL)


def clock() -> datetime:
    """Later than the kits, which are made in mid-test."""
    return datetime.now(UTC)


def flare(*arguments: str, folder: Path) -> None:
    """FLARE's command line, with a home of its own."""
    environment = {**os.environ, "HOME": str(folder)}
    command = [str(BIN / "nvflare"), *arguments]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def provisioned(folder: Path) -> Path:
    """The kits of a consortium that ``nvflare provision`` made; returns their folder."""
    ports = {"fed_learn_port": 8002, "admin_port": 8002}
    people = [
        {"name": f"{role}@example.org", "type": "admin", "org": "lead", "role": role}
        for role in ROLES
    ]
    builders: list[dict[str, Any]] = [
        {"path": f"{FLARE}.workspace.WorkspaceBuilder"},
        {"path": f"{FLARE}.static_file.StaticFileBuilder", "args": {"config_folder": "config"}},
        {"path": f"{FLARE}.cert.CertBuilder"},
    ]
    builders[0]["args"] = {"template_file": "master_template.yml"}
    project = {
        "api_version": 3,
        "name": "trial",
        "participants": [
            {"name": SERVER, "type": "server", "org": "lead", **ports},
            *({"name": site, "type": "client", "org": site} for site in ("berlin", "bonn")),
            *people,
        ],
        "builders": builders,
    }
    (folder / "project.yml").write_text(yaml.safe_dump(project))
    flare("provision", "-p", "project.yml", "-w", "workspace", folder=folder)
    return folder / "workspace" / "trial" / "prod_00"


@pytest.fixture(scope="session")
def kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return provisioned(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(scope="session")
def other_kits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another consortium of the same name, with sites of the same names."""
    return provisioned(tmp_path_factory.mktemp("other"))


@pytest.fixture(scope="session")
def approved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates of ``berlin`` and the server as ``nvflare cert approve`` makes them."""
    folder = tmp_path_factory.mktemp("approved")
    transport = {"scheme": "grpc", "connection_security": "mtls"}
    server = {"host": SERVER, "fed_learn_port": 8002, "admin_port": 8002}
    (folder / "profile.yml").write_text(
        yaml.safe_dump({"name": "trial", **transport, "server": server})
    )
    flare("cert", "init", "--profile", "profile.yml", "--output-dir", "ca", folder=folder)
    for name, kind in {"berlin": "client", SERVER: "server"}.items():
        party = {"name": name, "type": kind, "org": "org"}
        (folder / "party.yml").write_text(
            yaml.safe_dump({"name": "trial", "participants": [party]})
        )
        flare("cert", "request", "--participant", "party.yml", "--out", name, folder=folder)
        signed = ("--profile", "profile.yml", "--out", f"{name}.zip")
        request = f"{name}/{name}.request.zip"
        flare("cert", "approve", request, "--ca-dir", "ca", *signed, folder=folder)
        shutil.unpack_archive(folder / f"{name}.zip", folder / name)
    return folder


def startup(kits: Path, name: str) -> Path:
    return kits / name / "startup"


def certificate_in(kits: Path, name: str) -> bytes:
    file = "server.crt" if name == SERVER else "client.crt"
    return (startup(kits, name) / file).read_bytes()


def subject(names: Iterable[str], roles: Iterable[str] = ()) -> x509.Name:
    return x509.Name(
        [
            *(x509.NameAttribute(NameOID.COMMON_NAME, name) for name in names),
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "org"),
            *(x509.NameAttribute(NameOID.UNSTRUCTURED_NAME, role) for role in roles),
        ]
    )


CA = x509.BasicConstraints(ca=True, path_length=None)


def usage(**allowed: bool) -> x509.KeyUsage:
    every = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{**dict.fromkeys(every, False), **allowed})


@dataclass
class Authority:
    """A root that certifies what it is asked to."""

    key: Any = field(default_factory=ed25519.Ed25519PrivateKey.generate)
    extensions: Iterable[x509.ExtensionType] = (CA,)
    begins: datetime = NOW - 10 * DAY
    ends: datetime = NOW + 10 * DAY

    def __post_init__(self) -> None:
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "trial")])
        self.pem = self.certify(
            self.name, self.key, self.begins, self.ends, extensions=self.extensions
        )

    def certify(
        self,
        holder: x509.Name,
        key: Any,
        begins: datetime = NOW - DAY,
        ends: datetime = NOW + DAY,
        extensions: Iterable[x509.ExtensionType] = (),
    ) -> bytes:
        public = key.public_key() if hasattr(key, "public_key") else key
        builder = (
            x509.CertificateBuilder()
            .subject_name(holder)
            .issuer_name(self.name)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=True)
        is_ed25519 = isinstance(self.key, ed25519.Ed25519PrivateKey)
        digest = None if is_ed25519 else hashes.SHA256()
        return builder.sign(self.key, digest).public_bytes(PEM)

    def site(self, name: str = "bonn", *roles: str, **more: Any) -> bytes:
        key = more.pop("key", None) or ed25519.Ed25519PrivateKey.generate()
        return self.certify(subject([name], roles), key, **more)

    def kit(self, folder: Path, name: str = "bonn", **more: Any) -> Path:
        key = more.pop("key", None) or ed25519.Ed25519PrivateKey.generate()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "client.crt").write_bytes(self.site(name, key=key, **more))
        (folder / "client.key").write_bytes(private_pem(key))
        (folder / "rootCA.pem").write_bytes(self.pem)
        return folder

    @property
    def trust(self) -> Trust:
        return Trust.from_root(self.pem)


def private_pem(key: Any, password: bytes = b"") -> bytes:
    encryption: Any = serialization.NoEncryption()
    if password:
        encryption = serialization.BestAvailableEncryption(password)
    written: bytes = key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, encryption)
    return written


AUTHORITY = Authority()
BONN = AUTHORITY.site("bonn")


def one_sentence(error: FedgestaltError) -> None:
    said = str(error)
    assert said.endswith(".")
    assert "\n" not in said
    assert len(said) < 500
    assert NOTHING_SECRET.match(said)


def refusal(
    trust: Trust, site: str, certificate: bytes, now: datetime | Literal["now"] | None = "now"
) -> str:
    """What ``trust`` says against a certificate."""
    now = clock() if now == "now" else now
    with pytest.raises(PeerError) as caught:
        trust.check(site, certificate, now)
    assert caught.value.site == site
    one_sentence(caught.value)
    return str(caught.value)


def own_fault(act: Callable[[], object], folder: Path) -> str:
    """What an act says against this site's kit."""
    with pytest.raises(SiteError) as caught:
        act()
    one_sentence(caught.value)
    assert str(folder) not in "".join(traceback.format_exception_only(caught.value))
    return str(caught.value)


# what FLARE makes


@pytest.mark.parametrize("reader", ["berlin", "bonn", SERVER])
def test_a_statement_signed_with_a_real_kit_is_believed_with_any_real_kit(
    kits: Path, reader: str
) -> None:
    own = kit_identity(startup(kits, "berlin"))
    assert own.name == "berlin"
    assert own.certificate == certificate_in(kits, "berlin")
    peer = Trust.from_kit(startup(kits, reader)).check("berlin", own.certificate, clock())
    loaded = x509.load_pem_x509_certificate(own.certificate)
    assert peer.site == "berlin"
    assert (
        peer.fingerprint == loaded.fingerprint(hashes.SHA256()) == fingerprint_of(own.certificate)
    )
    peer.verify(STATEMENT, own.sign(STATEMENT))


def test_certificates_of_the_distributed_way_have_roles_and_a_sites_is_believed(
    approved: Path, tmp_path: Path
) -> None:
    for there, here in {"berlin.crt": "client.crt", "berlin.key": "client.key"}.items():
        shutil.copy(approved / "berlin" / there, tmp_path / here)
    shutil.copy(approved / "ca" / "rootCA.pem", tmp_path)
    own, trust = kit_identity(tmp_path), Trust.from_kit(tmp_path)
    trust.check("berlin", own.certificate, clock()).verify(STATEMENT, own.sign(STATEMENT))
    server = (approved / SERVER / f"{SERVER}.crt").read_bytes()
    assert "that of a 'server', not of a site" in refusal(trust, SERVER, server)


@pytest.mark.parametrize("role", ROLES)
def test_no_administrator_is_a_site(kits: Path, role: str) -> None:
    name = f"{role}@example.org"
    trust = Trust.from_kit(startup(kits, "bonn"))
    said = refusal(trust, name, certificate_in(kits, name))
    assert f"that of a '{role}', not of a site" in said
    kit = startup(kits, name)
    assert f"'{role}', not of a site" in own_fault(lambda: kit_identity(kit), kits)


@pytest.mark.parametrize("reader", ["berlin", SERVER])
def test_the_server_cannot_appear_as_a_site_even_under_its_own_name(
    kits: Path, reader: str
) -> None:
    trust = Trust.from_kit(startup(kits, reader))
    own = certificate_in(kits, SERVER)
    assert f"that of the server '{SERVER}'" in refusal(trust, SERVER, own)
    assert f"that of the server '{SERVER}'" in refusal(trust, "bonn", own)


def test_a_site_may_have_the_servers_name_if_its_certificate_says_that_it_is_a_site() -> None:
    trust = Trust.from_root(AUTHORITY.pem, servers=["bonn"])
    trust.check("bonn", AUTHORITY.site("bonn", "client"), clock())
    assert "that of the server" in refusal(trust, "bonn", AUTHORITY.site("bonn"))
    trust.check("berlin", AUTHORITY.site("berlin"), clock())


def test_the_root_is_not_a_site(kits: Path) -> None:
    trust = Trust.from_kit(startup(kits, "bonn"))
    root = (startup(kits, "bonn") / "rootCA.pem").read_bytes()
    assert "one that issues others" in refusal(trust, "trial", root)


def test_kits_of_another_consortium_are_not_believed_though_all_names_agree(
    kits: Path, other_kits: Path
) -> None:
    trust = Trust.from_kit(startup(kits, "bonn"))
    said = refusal(trust, "berlin", certificate_in(other_kits, "berlin"))
    assert "names the root 'trial' without its valid signature" in said
    Trust.from_kit(startup(other_kits, "bonn")).check(
        "berlin", certificate_in(other_kits, "berlin"), clock()
    )


def test_swapped_names_are_noticed(kits: Path) -> None:
    trust = Trust.from_kit(startup(kits, SERVER))
    for site, other in (("berlin", "bonn"), ("bonn", "berlin")):
        said = refusal(trust, site, certificate_in(kits, other))
        assert f"made out to '{other}', not to '{site}'" in said
    assert "not to 'Berlin'" in refusal(trust, "Berlin", certificate_in(kits, "berlin"))
    assert "not to ''" in refusal(trust, "", certificate_in(kits, "berlin"))


def test_signatures_of_flare_with_the_same_key_are_not_ours_nor_ours_flares(
    kits: Path,
) -> None:
    own = kit_identity(startup(kits, "berlin"))
    peer = Trust.from_kit(startup(kits, "bonn")).check("berlin", own.certificate, clock())
    pem = (startup(kits, "berlin") / "client.key").read_bytes()
    key = serialization.load_pem_private_key(pem, None)
    theirs = sign_content(STATEMENT, key, return_str=False)
    assert isinstance(key, rsa.RSAPrivateKey)
    verify_content(STATEMENT, theirs, key.public_key())
    with pytest.raises(PeerError, match="does not fit"):
        peer.verify(STATEMENT, theirs)
    ours = own.sign(STATEMENT)
    with pytest.raises(InvalidSignature):
        verify_content(STATEMENT, ours, key.public_key())
    salt = padding.PSS(padding.MGF1(hashes.SHA256()), 32)
    tagged = b"fedgestalt statement/1|" + STATEMENT
    key.public_key().verify(ours, tagged, salt, hashes.SHA256())


# keys and signatures

FITTING: Mapping[str, Callable[[], Any]] = {
    "RSA": lambda: rsa.generate_private_key(65537, 2048),
    "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "P-521": lambda: ec.generate_private_key(ec.SECP521R1()),
    "Ed25519": ed25519.Ed25519PrivateKey.generate,
}


def rsa_public(bits: int) -> rsa.RSAPublicKey:
    """A number that may be an RSA key, as far as anybody can see."""
    modulus = random.Random(bits).getrandbits(bits) | 1 << (bits - 1) | 1  # noqa: S311
    return rsa.RSAPublicNumbers(65537, modulus).public_key()


UNFIT: Mapping[str, Callable[[], Any]] = {
    "RSA of 1024 bits": lambda: rsa_public(1024),
    "RSA of 2047 bits": lambda: rsa_public(2047),
    "RSA of 8193 bits": lambda: rsa_public(8193),
    "ECDSA on secp224r1": lambda: ec.generate_private_key(ec.SECP224R1()),
    "ECDSA on secp256k1": lambda: ec.generate_private_key(ec.SECP256K1()),
    "of another kind": ed448.Ed448PrivateKey.generate,
    "is of another kind": x25519.X25519PrivateKey.generate,
    "key is of another kind": lambda: dsa.generate_private_key(2048),
}


@pytest.mark.parametrize("kind", FITTING)
def test_every_usual_kind_of_key_signs_and_no_changed_signature_is_believed(
    tmp_path: Path, kind: str
) -> None:
    key = FITTING[kind]()
    kit = AUTHORITY.kit(tmp_path, key=key)
    own, trust = kit_identity(kit), Trust.from_kit(kit)
    peer = trust.check("bonn", own.certificate, clock())
    good = own.sign(STATEMENT)
    assert len(good) <= SIGNATURE_LIMIT
    peer.verify(STATEMENT, good)
    somebody = AUTHORITY.kit(tmp_path / "other", key=FITTING[kind]())
    bad = {
        "nothing": b"",
        "half": good[: len(good) // 2],
        "more": good + b"\0",
        "twice": good * 2,
        "zeros": bytes(len(good)),
        "of the limit": bytes(SIGNATURE_LIMIT),
        "by another key": kit_identity(somebody).sign(STATEMENT),
        "of another statement": own.sign(STATEMENT + b"\0"),
        **{f"bit {n}": flipped(good, n) for n in range(0, 8 * len(good), 37)},
    }
    for name, signature in bad.items():
        with pytest.raises(PeerError, match="signature does not fit") as caught:
            peer.verify(STATEMENT, signature)
            pytest.fail(name)
        assert caught.value.site == "bonn"
        one_sentence(caught.value)
    for statement in (b"", STATEMENT[:-1], STATEMENT + b"\0", flipped(STATEMENT, 0)):
        with pytest.raises(PeerError, match="signature does not fit"):
            peer.verify(statement, good)


def flipped(content: bytes, bit: int) -> bytes:
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


@pytest.mark.parametrize("size", [SIGNATURE_LIMIT + 1, 10**6])
def test_a_long_signature_is_refused_unread(size: int) -> None:
    own = ephemeral_identity("bonn")
    peer = Trust.of_anybody().check("bonn", own.certificate, clock())
    with pytest.raises(PeerError, match=f"has {size} bytes") as caught:
        peer.verify(STATEMENT, bytes(size))
    one_sentence(caught.value)


@pytest.mark.parametrize("kind", UNFIT)
def test_weak_and_unusual_keys_are_refused(tmp_path: Path, kind: str) -> None:
    key = UNFIT[kind]()
    pem = AUTHORITY.site("bonn", key=key)
    said = refusal(AUTHORITY.trust, "bonn", pem)
    assert f"{kind}, and must be RSA of 2048 to 8192 bits" in said
    kit = AUTHORITY.kit(tmp_path)
    (kit / "client.crt").write_bytes(pem)
    assert "must be RSA" in own_fault(lambda: kit_identity(kit), tmp_path)


def test_a_long_rsa_key_within_the_limit_is_accepted() -> None:
    AUTHORITY.trust.check("bonn", AUTHORITY.site("bonn", key=rsa_public(8192)), clock())


# what certificates say


def issued(name: str, roles: Iterable[str] = (), *extensions: x509.ExtensionType) -> bytes:
    return AUTHORITY.site(name, *roles, extensions=extensions)


CLIENT_AND_SERVER = x509.ExtendedKeyUsage(
    [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
)


@pytest.mark.parametrize(
    "pem",
    [
        issued("bonn"),
        issued("bonn", ["client"]),
        issued("bonn", ["client"], x509.BasicConstraints(ca=False, path_length=None)),
        issued("bonn", ["client"], usage(digital_signature=True), CLIENT_AND_SERVER),
    ],
)
def test_certificates_of_a_site(pem: bytes) -> None:
    peer = AUTHORITY.trust.check("bonn", pem, clock())
    assert (peer.site, peer.fingerprint) == ("bonn", fingerprint_of(pem))
    assert PublicIdentity.__name__ in repr(peer)


@pytest.mark.parametrize(
    ("pem", "complaint"),
    [
        (issued("bonn", ["server"]), "that of a 'server'"),
        (issued("bonn", ["Client"]), "that of a 'Client'"),
        (issued("bonn", ["member"]), "that of a 'member'"),
        (issued("bonn", ["client", "lead"]), "that of a 'client' and 'lead'"),
        (issued("bonn", ["client"], CA), "one that issues others"),
        (issued("bonn", [], usage(key_cert_sign=True)), "one that issues others"),
        (issued("bonn", [], usage(key_encipherment=True)), "not for signatures of a client"),
        (
            issued("bonn", [], x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])),
            "not for signatures of a client",
        ),
        (
            AUTHORITY.certify(subject(["bonn", "bonn"]), AUTHORITY.key),
            "made out to 'bonn' and 'bonn'",
        ),
        (AUTHORITY.certify(subject(["berlin", "bonn"]), AUTHORITY.key), "made out to 'berlin'"),
        (AUTHORITY.certify(subject([]), AUTHORITY.key), "made out to nobody"),
        (issued("bonn "), "made out to 'bonn '"),
        (issued("bonn\n\x1b[2J"), r"made out to 'bonn\n\x1b[2J'"),
        (issued("bo\N{CYRILLIC SMALL LETTER EN}n"), "not to 'bonn'"),
        (Authority().site("bonn"), "without its valid signature"),
        (ephemeral_identity("bonn").certificate, "issued by 'bonn', not by the root 'trial'"),
    ],
)
def test_certificates_that_are_not_a_sites(pem: bytes, complaint: str, tmp_path: Path) -> None:
    assert complaint in refusal(AUTHORITY.trust, "bonn", pem)
    kit = AUTHORITY.kit(tmp_path)
    (kit / "client.crt").write_bytes(pem)
    with pytest.raises(SiteError):  # whatever its name is: the key is another
        kit_identity(kit)


@pytest.mark.parametrize(
    ("names", "complaint"), [([], "nobody"), (["bonn", "berlin"], "'bonn' and 'berlin'")]
)
def test_a_kit_is_that_of_one_site(tmp_path: Path, names: list[str], complaint: str) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    kit = AUTHORITY.kit(tmp_path, key=key)
    (kit / "client.crt").write_bytes(AUTHORITY.certify(subject(names), key))
    said = own_fault(lambda: kit_identity(kit), tmp_path)
    assert f"client.crt: the certificate is made out to {complaint}, not to one site" in said


def test_a_root_with_the_right_key_and_another_name_did_not_issue_it() -> None:
    renamed = Authority(AUTHORITY.key)
    renamed.name = subject(["another"])
    pem = renamed.certify(subject(["bonn"]), AUTHORITY.key)
    said = refusal(AUTHORITY.trust, "bonn", pem)
    assert "issued by 'another', not by the root 'trial'" in said


@pytest.mark.parametrize("digest", ["sha256", "sha384", "sha1", "md5"])
def test_signatures_of_the_root_over_broken_hashes_are_refused(tmp_path: Path, digest: str) -> None:
    def openssl(*arguments: str) -> None:
        command = ["openssl", *arguments]
        subprocess.run(command, cwd=tmp_path, capture_output=True, check=True, timeout=60)

    new = ("-newkey", "rsa:2048", "-nodes", "-subj")
    openssl("req", "-x509", *new, "/CN=trial", "-keyout", "ca.key", "-out", "ca.pem")
    openssl("req", *new, "/CN=bonn", "-keyout", "key", "-out", "request")
    root = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
    openssl("x509", "-req", "-in", "request", *root, f"-{digest}", "-out", "pem")
    trust = Trust.from_root((tmp_path / "ca.pem").read_bytes())
    pem = (tmp_path / "pem").read_bytes()
    if digest in {"sha1", "md5"}:
        assert "without its valid signature" in refusal(trust, "bonn", pem)
    else:
        trust.check("bonn", pem, clock())


@pytest.mark.parametrize(
    ("begins", "ends", "complaint"),
    [
        (-9, -3, "ended 3 days ago, on {ends}, if it is now {now}; check the clock"),
        (-9, -1.6, "ended 38 hours ago"),
        (-9, -0.1, "ended 2 hours ago"),
        (-9, -0.03, "ended 43 minutes ago"),
        (-9, -40 / 86400, "ended 40 seconds ago"),
        (0.1, 9, "begins in 2 hours, on {begins}, if it is now {now}; set the clocks"),
        (5, 9, "begins in 5 days"),
    ],
)
def test_a_certificate_out_of_time_says_how_far(
    begins: float, ends: float, complaint: str, tmp_path: Path
) -> None:
    now = NOW.replace(microsecond=0)
    first, last = now + begins * DAY, now + ends * DAY
    pem = AUTHORITY.site("bonn", begins=first, ends=last)
    shown = {
        name: f"{moment:%Y-%m-%d %H:%M:%S} UTC"
        for name, moment in {"begins": first, "ends": last, "now": now}.items()
    }
    said = refusal(AUTHORITY.trust, "bonn", pem, now)
    assert f"the certificate {complaint.format(**shown)}" in said
    AUTHORITY.trust.check("bonn", pem, None)
    AUTHORITY.trust.check("bonn", pem, first)
    AUTHORITY.trust.check("bonn", pem, last.replace(microsecond=0))
    kit = AUTHORITY.kit(tmp_path, begins=first, ends=last)
    said = own_fault(lambda: kit_identity(kit), tmp_path)
    assert said.startswith("client.crt: the certificate " + complaint.split(" ")[0])


def test_the_time_is_told_in_utc_wherever_the_caller_is() -> None:
    from zoneinfo import ZoneInfo

    now = datetime(2040, 1, 2, 3, 4, 5, tzinfo=ZoneInfo("Asia/Tokyo"))
    assert "if it is now 2040-01-01 18:04:05 UTC" in refusal(AUTHORITY.trust, "bonn", BONN, now)


def test_a_time_without_a_zone_is_a_mistake_of_the_caller_not_of_the_site() -> None:
    with pytest.raises(TypeError):
        AUTHORITY.trust.check("bonn", BONN, datetime(2026, 1, 1))  # noqa: DTZ001, RUF100


def test_an_expired_root_is_named_and_does_not_matter_for_old_transcripts() -> None:
    authority = Authority(begins=NOW - 9 * DAY, ends=NOW - 2 * DAY)
    pem = authority.site("bonn")
    assert "the root certificate ended 2 days ago" in refusal(authority.trust, "bonn", pem)
    authority.trust.check("bonn", pem, None)


# bytes that are not one certificate

KEY_PEM = private_pem(ed25519.Ed25519PrivateKey.generate())
DER = x509.load_pem_x509_certificate(BONN).public_bytes(serialization.Encoding.DER)


@pytest.mark.parametrize(
    ("pem", "complaint"),
    [
        (b"", "0 bytes are no certificate"),
        (BONN[:-1], "something beside"),
        (BONN[: len(BONN) // 2], "are no certificate in PEM, or a damaged one"),
        (BONN[:-26], "are no certificate in PEM, or a damaged one"),
        (BONN + BONN, "there are 2 certificates"),
        (BONN + AUTHORITY.pem, "there are 2 certificates"),
        (BONN + b"\n", "something beside"),
        (BONN + b"\0", "something beside"),
        (b" " + BONN, "something beside"),
        (b"Subject: bonn\n" + BONN, "something beside"),
        (BONN + KEY_PEM, "something beside"),
        (BONN.replace(b"\n", b"\r\n"), "something beside"),
        (BONN.replace(b"CERTIFICATE", b"X509 CERTIFICATE"), "something beside"),
        (DER, "are no certificate in PEM"),
        (KEY_PEM, "are no certificate in PEM"),
        (b"\xff" * CERTIFICATE_LIMIT, "are no certificate in PEM"),
        (b"\xff" * 10**6, "longer than 16384 bytes"),
        (BONN * 1000, "longer than 16384 bytes"),
        (b"-" * 10**6, "longer than 16384 bytes"),
        (b"-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", "or a damaged one"),
    ],
)
@pytest.mark.parametrize("anybody", [False, True])
def test_anything_but_one_certificate_is_refused(pem: bytes, complaint: str, anybody: bool) -> None:
    said = refusal(Trust.of_anybody() if anybody else AUTHORITY.trust, "bonn", pem)
    assert complaint in said


def test_a_certificate_of_the_greatest_size_is_read_and_of_one_byte_more_is_not() -> None:
    def of_size(size: int) -> bytes:
        content = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), bytes(size))
        return AUTHORITY.site("bonn", extensions=[content])

    sizes = {len(of_size(size)): size for size in range(11_600, 12_100)}
    inside = max(size for size in sizes if size <= CERTIFICATE_LIMIT)
    AUTHORITY.trust.check("bonn", of_size(sizes[inside]), clock())
    outside = min(size for size in sizes if size > CERTIFICATE_LIMIT)
    assert "longer than" in refusal(AUTHORITY.trust, "bonn", of_size(sizes[outside]))
    assert outside - inside < 8


def as_pem(der: bytes) -> bytes:
    text = base64.b64encode(der).decode()
    lines = "".join(f"{text[at : at + 64]}\n" for at in range(0, len(text), 64))
    return f"-----BEGIN CERTIFICATE-----\n{lines}-----END CERTIFICATE-----\n".encode()


@pytest.mark.filterwarnings("error")  # a warning of the library is no other exception either
def test_no_single_changed_bit_of_a_real_certificate_is_overlooked(kits: Path) -> None:
    pem = certificate_in(kits, "berlin")
    trust = Trust.from_kit(startup(kits, "bonn"))
    der = x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    assert as_pem(der) == pem
    for bit in range(8 * len(der)):
        refusal(trust, "berlin", as_pem(flipped(der, bit)))


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["change", "insert", "delete", "repeat", "cut"]),
        st.floats(0, 1, exclude_max=True),
        st.binary(min_size=1, max_size=12),
        st.integers(1, 40),
    ),
    min_size=1,
    max_size=4,
)
Edits = list[tuple[str, float, bytes, int]]


def edited(content: bytes, edits: Edits) -> bytes:
    for kind, where, new, length in edits:
        at = int(where * (len(content) + 1))
        before, after = content[:at], content[at:]
        content = {
            "change": before + new + after[len(new) :],
            "insert": before + new + after,
            "delete": before + after[length:],
            "repeat": before + after[:length] + after,
            "cut": before,
        }[kind]
    return content


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(edits=EDITS, inside=st.booleans(), anybody=st.booleans())
@settings(max_examples=2000, deadline=None)
def test_fuzz_a_changed_certificate_is_refused_whatever_was_changed(
    edits: Edits, inside: bool, anybody: bool
) -> None:
    original = ephemeral_identity("bonn").certificate if anybody else BONN
    trust = Trust.of_anybody() if anybody else AUTHORITY.trust
    if inside:
        loaded = x509.load_pem_x509_certificate(original)
        der = loaded.public_bytes(serialization.Encoding.DER)
        changed = as_pem(edited(der, edits))
    else:
        changed = edited(original, edits)
    if changed != original:
        refusal(trust, "bonn", changed)


@given(st.binary(max_size=400))
@settings(max_examples=200, deadline=None)
def test_fuzz_any_bytes_are_refused(content: bytes) -> None:
    refusal(AUTHORITY.trust, "bonn", content)
    refusal(AUTHORITY.trust, "bonn", as_pem(content))


def wrapped(tag: int, content: bytes) -> bytes:
    """One element of DER."""
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    length = size.to_bytes((size.bit_length() + 7) // 8, "big")
    return bytes([tag, 0x80 | len(length)]) + length + content


RICH = AUTHORITY.site(
    "bonn",
    "client",
    extensions=[
        x509.BasicConstraints(ca=False, path_length=None),
        usage(digital_signature=True),
        CLIENT_AND_SERVER,
        x509.SubjectAlternativeName([x509.DNSName("bonn")]),
    ],
)
SIGNED_PART = x509.load_pem_x509_certificate(RICH).tbs_certificate_bytes
HEAD = 4
"""Bytes of tag and length before its content."""
ED25519 = bytes.fromhex("300506032b6570")


def signed_anew(signed_part: bytes) -> bytes:
    """A certificate that the root has really signed, with any content."""
    signature = AUTHORITY.key.sign(signed_part)
    return as_pem(wrapped(0x30, signed_part + ED25519 + wrapped(3, b"\0" + signature)))


def test_a_part_signed_anew_is_accepted_as_it_is() -> None:
    AUTHORITY.trust.check("bonn", signed_anew(SIGNED_PART), clock())
    assert wrapped(0x30, SIGNED_PART[HEAD:]) == SIGNED_PART


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(EDITS, st.booleans())
@settings(max_examples=1000, deadline=None)
def test_fuzz_nonsense_that_the_root_itself_signed_is_refused_or_a_certificate_of_the_site(
    edits: Edits, lengths: bool
) -> None:
    if lengths:  # keep the outermost length right, so that what is inside gets read
        pem = signed_anew(wrapped(0x30, edited(SIGNED_PART[HEAD:], edits)))
    else:
        pem = signed_anew(edited(SIGNED_PART, edits))
    try:
        peer = AUTHORITY.trust.check("bonn", pem, clock())
    except PeerError as error:
        one_sentence(error)
        return
    assert peer.fingerprint == fingerprint_of(pem)
    loaded = x509.load_pem_x509_certificate(pem)
    assert [a.value for a in loaded.subject if a.oid == NameOID.COMMON_NAME] == ["bonn"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"\x06\x03\x55\x1d\x13", b"\x06\x03\x55\x1d\x0f"),  # key usage twice
        (b"\x82\x04bonn", b"\xa3\x04bonn"),  # a name of a kind that the library does not know
        (ED25519 + b"\x03", b"\x30\x05\x06\x03\x2b\x65\x7f\x03"),  # a key of no kind
    ],
)
def test_signed_contents_that_the_library_does_not_read(old: bytes, new: bytes) -> None:
    assert old in SIGNED_PART
    assert len(old) == len(new)
    at = SIGNED_PART.rindex(old)
    pem = signed_anew(SIGNED_PART[:at] + new + SIGNED_PART[at + len(old) :])
    assert "something that cannot be read" in refusal(AUTHORITY.trust, "bonn", pem)


def test_a_certificate_has_one_fingerprint_only() -> None:
    """What the issuer's signature does not cover cannot be changed either."""
    while True:
        der = x509.load_pem_x509_certificate(AUTHORITY.site("bonn")).public_bytes(
            serialization.Encoding.DER
        )
        if der[-1] % 2 == 0:  # so that its last bit can be called unused
            break
    AUTHORITY.trust.check("bonn", as_pem(der), clock())
    changed = as_pem(der[:-65] + b"\1" + der[-64:])
    loaded = x509.load_pem_x509_certificate(changed)
    loaded.verify_directly_issued_by(x509.load_pem_x509_certificate(AUTHORITY.pem))
    assert loaded.fingerprint(hashes.SHA256()) != fingerprint_of(as_pem(der))
    assert "not written so" in refusal(AUTHORITY.trust, "bonn", changed)


def test_the_outer_name_of_the_algorithm_counts(kits: Path) -> None:
    trust = Trust.from_kit(startup(kits, "bonn"))
    loaded = x509.load_pem_x509_certificate(certificate_in(kits, "berlin"))
    rsa_sha256 = bytes.fromhex("06092a864886f70d01010b")
    inside = loaded.tbs_certificate_bytes
    end = wrapped(3, b"\0" + loaded.signature)
    for parameters, fits in ((b"\5\0", True), (b"", False)):
        pem = as_pem(wrapped(0x30, inside + wrapped(0x30, rsa_sha256 + parameters) + end))
        if fits:
            trust.check("berlin", pem, clock())
        else:
            refusal(trust, "berlin", pem)


@pytest.mark.filterwarnings("error")
def test_every_byte_of_what_the_root_signed_may_be_nonsense() -> None:
    """Bytes changed one by one reach what random edits rarely do: all parts of the inside."""
    complaints = set()
    for at in range(len(SIGNED_PART)):
        for new in (0x00, 0x05, 0x30, 0x7F, 0x80, 0xFF, SIGNED_PART[at] ^ 1):
            changed = SIGNED_PART[:at] + bytes([new]) + SIGNED_PART[at + 1 :]
            try:
                AUTHORITY.trust.check("bonn", signed_anew(changed), clock())
            except PeerError as error:
                one_sentence(error)
                complaints.add(error.what.split(",")[0])
    for part in (
        "the certificate holds something that cannot be read",
        "the certificate is not for signatures of a client",
        "the certificate is made out to 'b\\x05nn'",
        "the certificate names the root 'trial' without its valid signature",
    ):
        assert part in complaints


# kits


@pytest.fixture
def kit(kits: Path, tmp_path: Path) -> Path:
    """A copy of a real kit, to be damaged."""
    return Path(shutil.copytree(startup(kits, "berlin"), tmp_path / "startup"))


@pytest.mark.parametrize("name", ["client.crt", "client.key", "rootCA.pem"])
def test_every_file_of_a_kit_is_needed(kit: Path, name: str) -> None:
    content = (kit / name).read_bytes()
    (kit / name).unlink()
    said = own_fault(lambda: kit_identity(kit), kit)
    assert said.startswith(f"startup kit: {name} is missing; unpack")
    (kit / name).mkdir()
    said = own_fault(lambda: kit_identity(kit), kit)
    assert f"{name} cannot be read (Is a directory)" in said
    (kit / name).rmdir()
    for damaged in (b"", b"garbage", content[:-40], bytes(10**6)):
        (kit / name).write_bytes(damaged)
        assert name in own_fault(lambda: kit_identity(kit), kit)


@pytest.mark.parametrize("name", ["client.crt", "client.key", "rootCA.pem"])
def test_a_long_file_is_refused_and_not_cut(kit: Path, name: str) -> None:
    content = (kit / name).read_bytes()
    (kit / name).write_bytes(content.ljust(CERTIFICATE_LIMIT, b"\n"))
    assert kit_identity(kit).name == "berlin"
    (kit / name).write_bytes(content.ljust(CERTIFICATE_LIMIT + 1, b"\n"))
    said = own_fault(lambda: kit_identity(kit), kit)
    assert said.startswith(f"startup kit: {name} is longer than 16384 bytes; ")


def test_a_server_kit_is_not_a_sites(kits: Path) -> None:
    said = own_fault(lambda: kit_identity(startup(kits, SERVER)), kits)
    assert "client.crt is missing" in said


def test_a_key_must_belong_to_the_certificate(kit: Path, kits: Path, other_kits: Path) -> None:
    for donor in (startup(kits, "bonn"), startup(other_kits, "berlin")):
        shutil.copy(donor / "client.key", kit)
        said = own_fault(lambda: kit_identity(kit), kit)
        assert said.startswith("startup kit: client.key does not belong to client.crt; ")
    (kit / "client.key").write_bytes(private_pem(FITTING["P-256"]()))
    assert "does not belong" in own_fault(lambda: kit_identity(kit), kit)


@pytest.mark.parametrize(
    "pem",
    [
        private_pem(FITTING["Ed25519"](), b"password"),
        private_pem(ed448.Ed448PrivateKey.generate()),
        private_pem(x25519.X25519PrivateKey.generate()),
        b"-----BEGIN PRIVATE KEY-----\nMIIEvgIBADANBgkqhkiG\n-----END PRIVATE KEY-----\n",
        b"-----BEGIN PRIVATE KEY-----",
    ],
)
def test_a_key_that_cannot_be_used_is_named_and_not_shown(kit: Path, pem: bytes) -> None:
    (kit / "client.key").write_bytes(pem)
    said = own_fault(lambda: kit_identity(kit), kit)
    assert "client.key is not an unencrypted private key in PEM" in said


def test_a_kit_with_the_root_of_another_consortium_is_refused(kit: Path, other_kits: Path) -> None:
    shutil.copy(startup(other_kits, "berlin") / "rootCA.pem", kit)
    said = own_fault(lambda: kit_identity(kit), kit)
    assert said.startswith("client.crt: the certificate names the root 'trial' without its valid")


def test_a_chain_in_a_kit_is_refused(kit: Path) -> None:
    for name in ("client.crt", "rootCA.pem"):
        good = (kit / name).read_bytes()
        (kit / name).write_bytes(good + (kit / "rootCA.pem").read_bytes())
        said = own_fault(lambda: kit_identity(kit), kit)
        assert said.startswith(f"{name}: there are 2 certificates")
        (kit / name).write_bytes(good)


def test_remarks_and_line_ends_in_a_kits_certificate_do_not_travel(kit: Path) -> None:
    good = (kit / "client.crt").read_bytes()
    (kit / "client.crt").write_bytes(b"Certificate:\r\n" + good.replace(b"\n", b"\r\n"))
    own = kit_identity(kit)
    assert own.certificate == good
    Trust.from_kit(kit).check("berlin", own.certificate, clock())


@pytest.mark.parametrize(
    ("authority", "complaint"),
    [
        (Authority(extensions=()), "'trial' is not one that issues others"),
        (Authority(extensions=[x509.BasicConstraints(ca=False, path_length=None)]), "is not one"),
        (Authority(FITTING["P-256"](), extensions=()), "is not one that issues others"),
        (Authority(ec.generate_private_key(ec.SECP224R1())), "ECDSA on secp224r1"),
        (Authority(rsa.generate_private_key(65537, 1024)), "RSA of 1024 bits"),  # noqa: S505
    ],
)
def test_a_root_must_be_a_sound_root(tmp_path: Path, authority: Authority, complaint: str) -> None:
    kit = authority.kit(tmp_path)
    for act in (
        lambda: Trust.from_kit(kit),
        lambda: Trust.from_root(authority.pem),
        lambda: kit_identity(kit),
    ):
        said = own_fault(act, tmp_path)
        assert said.startswith("rootCA.pem: the certificate")
        assert complaint in said


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"servers": [1]}', '{"servers": 1}'])
@pytest.mark.parametrize("name", ["fed_client.json", "fed_server.json"])
def test_a_damaged_start_file_is_an_error_not_a_server_without_name(
    kit: Path, name: str, content: str
) -> None:
    (kit / name).write_text(content)
    said = own_fault(lambda: Trust.from_kit(kit), kit)
    assert said.startswith(f"startup kit: {name} does not list the servers; ")


def test_a_kit_without_start_files_will_do(kit: Path) -> None:
    (kit / "fed_client.json").unlink()
    own = kit_identity(kit)
    assert Trust.from_kit(kit).check("berlin", own.certificate, clock()).site == "berlin"
    (kit / "fed_client.json").write_text('{"servers": [{"name": "trial"}]}')
    assert kit_identity(kit).name == "berlin"


# simulations


def test_simulated_sites_believe_each_other_and_real_ones_believe_no_simulated(
    kits: Path,
) -> None:
    own, anybody = ephemeral_identity("berlin"), Trust.of_anybody()
    peer = anybody.check("berlin", own.certificate, clock())
    peer.verify(STATEMENT, own.sign(STATEMENT))
    assert peer.fingerprint == fingerprint_of(own.certificate)
    said = refusal(Trust.from_kit(startup(kits, "bonn")), "berlin", own.certificate)
    assert "issued by 'berlin', not by the root 'trial'" in said
    said = refusal(Trust.from_kit(startup(kits, "bonn")), "berlin", own.certificate, None)
    assert "not by the root" in said
    assert "not to 'bonn'" in refusal(anybody, "bonn", own.certificate)
    said = refusal(anybody, "berlin", certificate_in(kits, "berlin"))
    assert "not signed by its own key" in said
    assert "ended" in refusal(anybody, "berlin", own.certificate, NOW + 400 * DAY)


def test_each_simulated_identity_is_another_and_only_its_own_key_signs_for_it() -> None:
    first, second = ephemeral_identity("bonn"), ephemeral_identity("bonn")
    assert fingerprint_of(first.certificate) != fingerprint_of(second.certificate)
    peer = Trust.of_anybody().check("bonn", first.certificate, clock())
    with pytest.raises(PeerError, match="does not fit"):
        peer.verify(STATEMENT, second.sign(STATEMENT))


def test_a_simulated_identity_touches_no_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    touched: list[object] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if watching and event in {"open", "os.mkdir", "tempfile.mkstemp", "subprocess.Popen"}:
            touched.append((event, arguments))

    watching = True
    sys.addaudithook(hook)  # stays, and does nothing, once watching is over
    try:
        own = ephemeral_identity("bonn")
        Trust.of_anybody().check("bonn", own.certificate, clock()).verify(b"", own.sign(b""))
    finally:
        watching = False
    assert touched == []


@pytest.mark.parametrize("name", ["", "x" * 65])
def test_a_name_that_no_certificate_can_hold_is_named(tmp_path: Path, name: str) -> None:
    said = own_fault(lambda: ephemeral_identity(name), tmp_path)
    assert f"has {len(name)} characters, and a certificate takes 1 to 64" in said
    assert ephemeral_identity("x" * 64).name == "x" * 64
    assert ephemeral_identity("Köln").name == "Köln"


# secrets and fingerprints


def test_nothing_secret_is_shown_or_travels(kit: Path) -> None:
    for own in (kit_identity(kit), ephemeral_identity("berlin")):
        assert repr(own) == str(own) == "Identity(name='berlin')"
        assert isinstance(own, Identity)
        with pytest.raises(TypeError):
            pickle.dumps(own)
        assert b"PRIVATE" not in own.certificate
    shown = repr(Trust.from_kit(kit)) + repr(Trust.of_anybody())
    assert NOTHING_SECRET.match(shown)


def test_a_fingerprint_is_that_which_openssl_prints(kits: Path, tmp_path: Path) -> None:
    file = startup(kits, "bonn") / "client.crt"
    command = ["openssl", "x509", "-fingerprint", "-sha256", "-noout", "-in", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    printed = done.stdout.strip().partition("=")[2].replace(":", "").lower()
    assert fingerprint_of(file.read_bytes()).hex() == printed
    for wrong in (b"", b"garbage", BONN + BONN, bytes(10**6)):
        own_fault(lambda wrong=wrong: fingerprint_of(wrong), tmp_path)  # type: ignore[misc]
