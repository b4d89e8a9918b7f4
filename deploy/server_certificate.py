"""Looks after the server's own certificate: renewed in time, here or by hand, and taken up by who uses it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from cryptography import x509

from client.certificates import days_left, read_certificate
from deploy.federation import Federation
from deploy.processes import Events
from deploy.renewal import renew_server, renewal_due
from deploy.runs import next_run

LOOK_SECONDS = 5.0
LAST_SHARE = 1 / 6  # of a certificate's life: so near to its end the SuperLink takes up the new one during a run, too


class ServerCertificate:
    """One federation server's certificate.

    Args:
        apply: has the gateway take up the files as they are; raises when it did not.
        restart_superlink: the SuperLink reads its certificate only when it starts.
        tell: told what happens; never raises.
    """

    def __init__(
        self,
        federation: Federation,
        apply: Callable[[], None],
        restart_superlink: Callable[[], None],
        tell: Events,
    ) -> None:
        self.federation, self.apply, self.restart_superlink, self.tell = federation, apply, restart_superlink, tell
        self._seen = _stamp(federation.server_crt)
        self._held: x509.Certificate | None = None  # by the SuperLink, once there is a newer one
        self._latest = read_certificate(federation.server_crt)
        self._trouble = ""

    def follow(self, stop: threading.Event) -> None:
        """Look until `stop`."""
        while not stop.wait(LOOK_SECONDS):
            self.look()

    def look(self) -> None:
        """Renew it if it is time, and have a new one taken up. Whatever fails is tried again at the next look."""
        try:
            if renewal_due(self._latest):
                self._renew()
            self._take_up()
        except Exception as error:  # whatever it is, the certificate has to be looked after on
            if str(error) != self._trouble:  # once, not every five seconds
                self._trouble = str(error)
                self.tell("not_renewed", {"reason": str(error), "days_left": round(days_left(self._latest), 2)})
        else:
            self._trouble = ""

    def _renew(self) -> None:
        if renewal_due(read_certificate(self.federation.server_crt)):  # not by hand meanwhile
            renew_server(self.federation)
            self.tell("server_renewed", {})

    def _take_up(self) -> None:
        stamp = _stamp(self.federation.server_crt)
        if stamp != self._seen:
            latest = read_certificate(self.federation.server_crt)
            self.apply()
            self._seen, self._held, self._latest = stamp, self._held or self._latest, latest
        if self._held is None:
            return
        # A run survives a new SuperLink, but need not be disturbed; one that waits for sites could wait for ever.
        if next_run(self.federation.runs) is None or _ends_soon(self._held):
            self.restart_superlink()
            self._held = None


def _stamp(path: Path) -> int:
    return path.stat().st_mtime_ns


def _ends_soon(certificate: x509.Certificate) -> bool:
    life = (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds() / 86_400
    return days_left(certificate) < LAST_SHARE * life
