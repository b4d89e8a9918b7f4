"""Does the server prove who it is, does it take this site's certificate, and do the clocks agree?

The way is the SuperNode's own: through HTTPS_PROXY (HTTP CONNECT) where it is set, TLS 1.3 pinned to the federation's
CA, with the site's certificate. One GET is sent, after the server has proved who it is; to anybody else nothing is
sent at all, only the certificate that is shown is looked at, so that an inspecting firewall can be named.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from cryptography import x509

from client.certificates import load_pair
from deploy.doctor.checks import Check, plain_text
from deploy.doctor.connection import Hindrance, Link, connect, read_answer, resolve, status_of

NAMES = ("server address", "server connection", "server TLS", "client certificate", "clock")

# Flower takes a node's signature that is up to 300 s old or 5 s ahead of the server's clock.
AHEAD_SECONDS = 5.0
BEHIND_WARN, BEHIND_FAIL = 30.0, 120.0
DATE_RESOLUTION = 1.0  # seconds, of an HTTP Date header

# OpenSSL's words (openssl/sslerr.h) for "the other end speaks no TLS" and for "no version in common".
_PLAINTEXT = (
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "HTTPS_PROXY_REQUEST",
    "RECORD_LAYER_FAILURE",
    "PACKET_LENGTH_TOO_LONG",
    "UNKNOWN_PROTOCOL",
)
_OLD_VERSION = ("TLSV1_ALERT_PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "WRONG_SSL_VERSION", "VERSION_TOO_LOW")
_MISMATCH = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH

# Alerts by which a server turns the client's certificate down (RFC 8446, 6.2).
_REJECTED = {
    "SSLV3_ALERT_CERTIFICATE_REVOKED": "it is revoked",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it has expired by the server's clock",
    "TLSV1_ALERT_UNKNOWN_CA": "its CA is not known there",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "none was shown",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "no reason was given",
    "SSLV3_ALERT_BAD_CERTIFICATE": "it is damaged or unsuitable",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": "it is of the wrong kind",
    "TLSV1_ALERT_ACCESS_DENIED": "access is denied",
    "TLSV1_ALERT_DECRYPT_ERROR": "key and certificate do not fit",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "no reason was given",
}
_ADMIT = "Ask the coordinator whether the site was revoked; then it joins again, with new keys: docs/federation.md."
_GATEWAY = "Ask the coordinator whether the gateway is well: medsegfed doctor --folder FEDERATION there."


def check_server(link: Link, now: Callable[[], float] = time.time) -> Iterator[Check]:
    """Address, connection, TLS, the site's certificate and the clock, `NAMES`; what follows a hindrance is skipped."""
    done = 0
    try:
        for check in _walk(link, now):
            done += 1
            yield check
    except Hindrance as end:
        yield end.check
        for name in NAMES[done + 1 :]:
            yield Check(name, "skipped", f"needs '{end.check.name}' first")


def _walk(link: Link, now: Callable[[], float]) -> Iterator[Check]:
    yield resolve(link)
    started = time.monotonic()
    connection = connect(link)
    took = 1000 * (time.monotonic() - started)
    through = f" through the proxy {link.proxy}" if link.proxy else ""
    yield Check("server connection", "ok", f"{link} answers{through} ({took:.0f} ms)", figures={"ms": round(took)})
    with connection, _shake_hands(link, connection, now) as secured:
        yield Check("server TLS", "ok", f"{secured.version()}, and the certificate is the federation's")
        sent, started = now(), time.monotonic()
        answer = _ask(link, secured)
        trip = time.monotonic() - started
    yield _accepted(link, answer)
    yield clock_check(answer.headers.get("date"), sent + trip / 2, trip)


def _shake_hands(link: Link, connection: socket.socket, now: Callable[[], float]) -> ssl.SSLSocket:
    """The TLS 1.3 handshake, as the SuperNode makes it. Raises Hindrance."""
    name = NAMES[2]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    try:
        context.load_verify_locations(link.ca)
        if link.pair is not None:
            load_pair(context, link.pair)
    except OSError:  # ssl.SSLError is one
        advice = "See the check 'certificates'. A new kit mends it: medsegfed join --kit FILE."
        raise Hindrance(name, "this site's CA, certificate or key cannot be loaded", advice) from None
    connection.settimeout(link.seconds)
    try:
        return context.wrap_socket(connection, server_hostname=link.host)
    except TimeoutError:
        fact = f"{link} takes the connection and then says nothing for {link.seconds:g} s"
        advice = f"Is it the right port? Then a firewall swallows TLS: ask IT to exempt {link} from inspection."
    except ssl.SSLCertVerificationError as error:
        fact, advice = _unverified(link, error, now)
    except ssl.SSLError as error:
        fact, advice = _no_handshake(link, error.reason or "no reason given")
    except OSError:
        fact = f"{link} hangs up in the middle of the TLS handshake"
        advice = f"A firewall that cuts TLS does so: ask IT to exempt {link}; else ask the coordinator."
    raise Hindrance(name, fact, advice)


def _unverified(link: Link, error: ssl.SSLCertVerificationError, now: Callable[[], float]) -> tuple[str, str]:
    """Fact and advice where the certificate shown is not the one that is due."""
    shown = _shown_certificate(link)
    if shown is not None and (stranger := _stranger(link, shown)) is not None:
        return stranger
    message = plain_text(error.verify_message or "no reason given")
    moment = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(now()))
    if shown is None:
        advice = f"Ask IT to exempt {link} from inspection; else ask the coordinator."
        return f"the certificate that {link} shows is not accepted ({message})", advice
    if now() > shown.not_valid_after_utc.timestamp():
        end = f"{shown.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
        advice = "Is the clock right? Then tell the coordinator to run: medsegfed renew."
        return f"the server's certificate expired on {end}; this machine's clock says {moment}", advice
    if now() < shown.not_valid_before_utc.timestamp():
        begin = f"{shown.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        advice = "Set the clock (NTP). Is it right? Then tell the coordinator."
        return f"the server's certificate is valid from {begin} on; this machine's clock says {moment}", advice
    if error.verify_code in _MISMATCH:
        advice = f"Ask the coordinator to add {link.host} to `hosts` in federation.yaml, then: medsegfed renew"
        return f"the server's certificate is for {subjects(shown)}, not for {link.host}", advice
    advice = "Ask the coordinator to run: medsegfed renew."
    return f"the server's certificate is not accepted ({message})", advice


def _no_handshake(link: Link, reason: str) -> tuple[str, str]:
    """Fact and advice where no handshake came about; `reason`: OpenSSL's word for it."""
    shown = _shown_certificate(link)
    if shown is not None and (stranger := _stranger(link, shown)) is not None:
        return stranger
    if reason in _OLD_VERSION:
        fact = f"{link} speaks TLS 1.2 or older; TLS 1.3 is required"
        return fact, f"Does a firewall inspect TLS? Ask IT to exempt {link}; else ask the coordinator."
    if reason in _PLAINTEXT:
        fact = f"{link} answers in plain text, without TLS"
        return fact, "Check the port with the coordinator; does a login page of the network answer instead? Ask IT."
    if reason in _REJECTED:
        return f"{link} turns this site's certificate down: {_REJECTED[reason]}", _ADMIT
    fact = f"the TLS handshake with {link} failed ({plain_text(reason)})"
    return fact, f"Does a firewall inspect TLS? Ask IT to exempt {link}; else ask the coordinator."


def _stranger(link: Link, shown: x509.Certificate) -> tuple[str, str] | None:
    """Fact and advice where the certificate shown does not come from the federation's CA."""
    try:
        authorities = x509.load_pem_x509_certificates(link.ca.read_bytes())
    except (OSError, ValueError):
        return None
    if any(issued_by(shown, authority) for authority in authorities):
        return None
    issuer = plain_text(shown.issuer.rfc4514_string()) or "(no name)"
    if any(shown.issuer == authority.subject for authority in authorities):
        fact = f"the certificate shown names '{issuer}' as its issuer, but another key signed it than this site knows"
        return fact, "The CA was made anew, or somebody feigns it: ask the coordinator by phone, and for a new kit."
    fact = f"the certificate shown is issued by '{issuer}', not by the federation: an inspecting firewall sits between"
    return fact, f"Ask IT to exempt {link} from TLS inspection; is it the right server at all? The coordinator knows."


def issued_by(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    """Whether the authority's key signed the certificate under the authority's name."""
    try:
        certificate.verify_directly_issued_by(authority)
    except Exception:  # another issuer, another kind of key, a wrong signature: each has a type of its own
        return False
    return True


def _shown_certificate(link: Link) -> x509.Certificate | None:
    """What the other end shows, unverified: to be named. No certificate is shown to it and nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with contextlib.suppress(Hindrance, OSError, ValueError), connect(link) as connection:
        connection.settimeout(link.seconds)
        with context.wrap_socket(connection, server_hostname=link.host) as secured:
            shown = secured.getpeercert(binary_form=True)
        return x509.load_der_x509_certificate(shown) if shown else None
    return None


def subjects(certificate: x509.Certificate) -> str:
    """The host names and addresses of a certificate."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, ValueError):
        return "no host name at all"
    found = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
    return plain_text(", ".join(found)) or "no host name at all"


@dataclass(frozen=True)
class Answer:
    """What the server said to the GET."""

    status: int | None  # None: no HTTP
    headers: Mapping[str, str]  # names in lower case
    body: str


def _ask(link: Link, secured: ssl.SSLSocket) -> Answer:
    """One GET. With TLS 1.3 a server that turns the client's certificate down says so now, not in the handshake.

    Raises:
        Hindrance: it did, or it says nothing.
    """
    name = NAMES[3]
    try:
        with contextlib.suppress(ConnectionError, ssl.SSLEOFError):  # turned down already: the alert waits to be read
            secured.sendall(
                f"GET / HTTP/1.1\r\nHost: {link}\r\nUser-Agent: medsegfed-doctor\r\nConnection: close\r\n\r\n".encode()
            )
        text = read_answer(secured, link.seconds, whole=True)
    except TimeoutError:
        fact = f"{link} shakes hands and then says nothing for {link.seconds:g} s"
        raise Hindrance(name, fact, _GATEWAY) from None
    except ssl.SSLError as error:
        why = _REJECTED.get(error.reason or "", plain_text(error.reason or "no reason was given"))
        raise Hindrance(name, f"the server turns this site's certificate down: {why}", _ADMIT) from None
    except OSError:
        fact = "the server hangs up after the handshake, as it does on a certificate that it does not take"
        raise Hindrance(name, fact, _ADMIT) from None
    top, _, body = text.partition("\r\n\r\n")
    headers: dict[str, str] = {}
    for line in top.split("\r\n")[1:]:
        key, _, value = line.partition(":")
        headers.setdefault(key.strip().lower(), value.strip())
    return Answer(status_of(text), headers, body)


def _accepted(link: Link, answer: Answer) -> Check:
    """Whether the gateway took the certificate: nginx says so in HTTP, by a page with status 400."""
    name = NAMES[3]
    if answer.status is None:
        fact = f"{link} shows the federation's certificate but does not answer in HTTP"
        return Check(name, "fail", fact, _GATEWAY)
    if answer.status == 400 and "No required SSL certificate" in answer.body:
        fact = "the server asks for a certificate and this site shows none"
        return Check(name, "fail", fact, "Install the kit: medsegfed join --kit FILE.")
    if answer.status == 400 and "certificate" in answer.body.lower():
        fact = "the server turns this site's certificate down: revoked, or of another federation"
        return Check(name, "fail", fact, _ADMIT)
    if answer.status == 429 or answer.status >= 500:
        fact = f"the server answers {answer.status}: it is overloaded or not whole"
        return Check(name, "warn", fact, "Try again in a minute; does it stay? Then ask the coordinator.")
    return Check(name, "ok", "the server takes this site's certificate", figures={"status": answer.status})


def clock_check(date: str | None, local: float, trip: float) -> Check:
    """This machine's clock against the server's.

    Args:
        date: the HTTP Date header: whole seconds, so the server's time is up to one second later.
        local: this machine's time in the middle of the round trip, seconds since 1970.
        trip: the round trip in seconds; in which half of it the server looked at its clock is not known.
    """
    try:
        server = parsedate_to_datetime(date or "").timestamp() + DATE_RESOLUTION / 2
    except (TypeError, ValueError):
        return Check("clock", "warn", "the server does not tell its time", "Compare this machine's clock with NTP.")
    offset, error = local - server, (DATE_RESOLUTION + trip) / 2
    figures = {"offset_seconds": round(offset, 2), "error_seconds": round(error, 2)}
    fact = f"{abs(offset):.1f} s {'ahead of' if offset >= 0 else 'behind'} the server, give or take {error:.1f} s"
    advice = "Switch NTP on (sudo timedatectl set-ntp true), or ask IT for a time server within this machine's reach."
    if offset - error > AHEAD_SECONDS:
        fact += f"; Flower refuses a site more than {AHEAD_SECONDS:g} s ahead"
        return Check("clock", "fail", fact, advice, figures)
    if -offset > BEHIND_FAIL:
        return Check("clock", "fail", f"{fact}; Flower refuses a site 300 s behind", advice, figures)
    if offset + error > AHEAD_SECONDS or -offset > BEHIND_WARN:
        return Check("clock", "warn", fact, advice, figures)
    return Check("clock", "ok", fact, figures=figures)
