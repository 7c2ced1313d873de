"""Where the page may listen: `shoal up --dashboard HOST:PORT`, checked before anything starts."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509

from shoal.protocol.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class DashboardOptions:
    """What the command line says about the page. `certificate` and `key` are PEM files, both or neither."""

    host: str
    port: int  # 0: any free one
    certificate: Path | None = None
    key: Path | None = None

    @property
    def scheme(self) -> str:
        return "http" if self.certificate is None else "https"


def dashboard_options(address: str, tls: tuple[Path, Path] | None, without_tls: bool) -> DashboardOptions:
    """Raises UsageError for an address that is none, files that do not fit, and plain text to others."""
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        ip = ipaddress.ip_address("127.0.0.1" if host == "localhost" else host)
        number = int(port)
        if not 0 <= number <= 65535:
            raise ValueError(port)
    except ValueError:
        raise UsageError(
            f"--dashboard takes an IP address and a port, like 127.0.0.1:8080; not {address!r}"
        ) from None
    if tls is not None:
        _check_pair(*tls)
        return DashboardOptions(host=str(ip), port=number, certificate=tls[0], key=tls[1])
    if not ip.is_loopback and not without_tls:
        raise UsageError(
            f"the page would be served to {address} in plain text: who listens in could act as the owner\n"
            "add --dashboard-tls CERT.PEM KEY.PEM; or keep --dashboard 127.0.0.1:8080 and tunnel, like\n"
            "  ssh -L 8080:127.0.0.1:8080 THIS-MACHINE\n"
            "--dashboard-without-tls does it all the same, for a network that is yours alone"
        )
    return DashboardOptions(host=str(ip), port=number)


def _check_pair(certificate: Path, key: Path) -> None:
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"--dashboard-tls: {certificate} and {key} are no certificate with its key, as PEM ({error})"
        ) from error


def certificate_names(certificate: Path) -> tuple[str, ...]:
    """The host names that a certificate is for, wildcards included. Blocking."""
    try:
        found = x509.load_pem_x509_certificate(certificate.read_bytes()).extensions
        names = found.get_extension_for_class(x509.SubjectAlternativeName).value
        return tuple(name.lower() for name in names.get_values_for_type(x509.DNSName))
    except (ValueError, x509.ExtensionNotFound):
        return ()
