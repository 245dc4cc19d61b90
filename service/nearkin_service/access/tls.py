"""Certificates of a service: who it is and, if it asks for theirs, whose clients it lets in."""

from __future__ import annotations

import logging
import ssl
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc

log = logging.getLogger("nearkin.access")

_OUT_OF_DATE = {9: "is not valid yet", 10: "has expired"}
"""By OpenSSL's X509_V_ERR_..."""


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files. `client_ca`: callers must show a certificate signed by it (mutual TLS)."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        """ValueError: a file cannot be read, or certificate and key do not belong together."""
        for path in (self.certificate, self.key, self.client_ca):
            if path is not None and not path.is_file():
                raise ValueError(f"{path} is not a file; TLS needs PEM files")
        self.context()

    @staticmethod
    def given(certificate: Path | None, key: Path | None, client_ca: Path | None) -> TlsFiles | None:
        """None without any of them. ValueError: only some of them."""
        if certificate is None and key is None and client_ca is None:
            return None
        if certificate is None or key is None:
            raise ValueError("TLS needs both --tls-certificate and --tls-key")
        return TlsFiles(certificate, key, client_ca)

    @property
    def asks_clients(self) -> bool:
        return self.client_ca is not None

    def context(self) -> ssl.SSLContext:
        """For HTTP. Client certificates are not asked for there: probes have none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (ssl.SSLError, OSError) as error:
            raise ValueError(
                f"{self.certificate} and its key cannot be used: {error.strerror or error}"
            ) from error
        return context

    def warn_if_out_of_date(self) -> None:
        """Of the service's own certificate: every client would refuse it."""
        if why := _OUT_OF_DATE.get(self._verify_code()):
            log.warning("%s %s: clients will not trust this service; renew it", self.certificate, why)

    def _verify_code(self) -> int:
        """What a client says to the certificate who has no other doubts; 0: nothing.

        Nothing else in the standard library tells until when a certificate lasts.
        """
        trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trusting.check_hostname = False
        trusting.verify_flags |= ssl.VerifyFlags.VERIFY_X509_PARTIAL_CHAIN  # without an authority
        with suppress(ssl.SSLError):
            trusting.load_verify_locations(self.certificate)
        to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = trusting.wrap_bio(to_client, to_server)
        server = self.context().wrap_bio(to_server, to_client, server_side=True)
        try:
            for end in (client, server, client):
                with suppress(ssl.SSLWantReadError):
                    end.do_handshake()
        except ssl.SSLCertVerificationError as error:
            return error.verify_code
        return 0

    def credentials(self) -> grpc.ServerCredentials:
        """For gRPC."""
        client_ca = self.client_ca.read_bytes() if self.client_ca else None
        return grpc.ssl_server_credentials(
            [(self.key.read_bytes(), self.certificate.read_bytes())],
            root_certificates=client_ca,
            require_client_auth=client_ca is not None,
        )
