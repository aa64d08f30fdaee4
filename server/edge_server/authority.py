"""A small certificate authority of the coordinator's own: for devices, for the broker, and for the coordinator.

Keys are ECDSA on P-256, which every TLS library of the last fifteen years can check. The authority's own key lies in
the coordinator's folder, readable by its owner only: whoever has it can be any device.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from edge_sdk.errors import ConfigError, StoreError
from edge_sdk.files import replace_file, storage_error

_ROOT_DAYS = 3650
_BEFORE_S = 86_400.0
"""A certificate counts from a day before it was made: clocks of devices differ."""
CA_NAME, KEY_NAME, CRL_NAME = "ca.pem", "ca.key", "crl.pem"


class Issued(NamedTuple):
    """A certificate."""

    certificate: str
    """PEM."""
    key: str
    """PEM; empty if the certificate is for a key that was made before."""
    serial: str
    expires: float
    """Seconds since the epoch."""


class Authority:
    """Signs certificates and lists those that were revoked.

    Args:
        folder: Where its key and certificate are, or come to be.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def exists(self) -> bool:
        """Whether it was made."""
        return (self.folder / KEY_NAME).exists()

    def make(self, now: float) -> None:
        """Make its key, certificate and an empty list of revoked ones, unless they are there.

        Raises:
            StoreError: They cannot be written.
        """
        if self.exists:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise storage_error(error, f"cannot make {self.folder}") from error
        key = ec.generate_private_key(ec.SECP256R1())
        name = _name(f"edge authority {os.urandom(4).hex()}")
        certificate = (
            _builder(name, name, key.public_key(), now, _ROOT_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage("key_cert_sign", "crl_sign"), critical=True)
            .sign(key, _sha256())
        )
        replace_file(self.folder / CA_NAME, _pem(certificate).encode())
        replace_file(self.folder / KEY_NAME, _key_pem(key).encode(), mode=0o600)  # last: now it exists
        self.write_crl([], now)

    @property
    def ca_pem(self) -> str:
        """The authority's certificate.

        Raises:
            StoreError: It cannot be read.
        """
        return self._read(CA_NAME).decode()

    def issue(self, name: str, *, days: float, now: float, hosts: Sequence[str] = ()) -> Issued:
        """A new key and a certificate for it.

        Args:
            name: Common name: what the broker takes for the user name.
            days: How long it is good.
            now: Seconds since the epoch.
            hosts: Names and addresses of a server; none: it is a client's.

        Raises:
            StoreError: The authority's files cannot be read.
        """
        key = ec.generate_private_key(ec.SECP256R1())
        return self._sign(name, key.public_key(), days, now, hosts)._replace(key=_key_pem(key))

    def reissue(self, certificate: str, *, days: float, now: float) -> Issued:
        """A later certificate of a client for the key that it has already: no private key has to travel.

        Raises:
            StoreError: The authority's files cannot be read.
        """
        before = x509.load_pem_x509_certificate(certificate.encode())
        public = before.public_key()
        if not isinstance(public, ec.EllipticCurvePublicKey):
            raise ConfigError("a certificate of another authority cannot be renewed here")
        common = before.subject.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value
        return self._sign(str(common), public, days, now, ())

    def write_crl(self, revoked: Iterable[tuple[str, float]], now: float) -> Path:
        """Write the list of revoked certificates, (serial, when) each, for the broker; returns its path.

        Raises:
            StoreError: It cannot be written, or the authority's files not read.
        """
        ca, key = self._own()
        path = self.folder / CRL_NAME
        builder = x509.CertificateRevocationListBuilder().issuer_name(ca.subject)
        # it has to be replaced only when something changes: brokers refuse everybody once a list is out of date
        builder = builder.last_update(self._crl_date(path, now)).next_update(ca.not_valid_after_utc)
        for serial, when in revoked:
            entry = x509.RevokedCertificateBuilder().serial_number(int(serial, 16)).revocation_date(_date(when)).build()
            builder = builder.add_revoked_certificate(entry)
        replace_file(path, _pem(builder.sign(key, _sha256())).encode())
        return path

    def _crl_date(self, path: Path, now: float) -> dt.datetime:
        """A date above that of the list before: of two lists OpenSSL, and a broker that runs, takes the later one."""
        date = _date(now - _BEFORE_S)
        if not path.exists():
            return date
        before = x509.load_pem_x509_crl(self._read(CRL_NAME)).last_update_utc
        # one from the future says that the clock was wrong then, and would make the broker refuse everybody
        return max(date, before + dt.timedelta(seconds=1)) if before < _date(now) else date

    def _sign(
        self, name: str, public: ec.EllipticCurvePublicKey, days: float, now: float, hosts: Sequence[str]
    ) -> Issued:
        ca, key = self._own()
        end = min(now + days * 86_400, ca.not_valid_after_utc.timestamp())
        purpose = ExtendedKeyUsageOID.SERVER_AUTH if hosts else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = (
            _builder(_name(name), ca.subject, public, now, (end - now) / 86_400)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage("digital_signature"), critical=True)
            .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
        )
        if hosts:
            builder = builder.add_extension(
                x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False
            )
        certificate = builder.sign(key, _sha256())
        return Issued(_pem(certificate), "", f"{certificate.serial_number:x}", end)

    def _own(self) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
        key = load_pem_private_key(self._read(KEY_NAME), None)
        if not isinstance(key, ec.EllipticCurvePrivateKey):
            raise StoreError(f"{self.folder / KEY_NAME} holds a key of another kind")
        return x509.load_pem_x509_certificate(self._read(CA_NAME)), key

    def _read(self, name: str) -> bytes:
        try:
            return (self.folder / name).read_bytes()
        except OSError as error:
            raise storage_error(error, f"cannot read {self.folder / name}") from error


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, now: float, days: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_date(now - _BEFORE_S))
        .not_valid_after(_date(now + days * 86_400))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*allowed: str) -> x509.KeyUsage:
    names = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement"),
        *("key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{name: name in allowed for name in names})


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _date(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(int(seconds), dt.UTC)


def _sha256() -> hashes.SHA256:
    return hashes.SHA256()


def _pem(thing: x509.Certificate | x509.CertificateRevocationList) -> str:
    return thing.public_bytes(Encoding.PEM).decode()


def _key_pem(key: ec.EllipticCurvePrivateKey) -> str:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
