"""`medsegfed site start`: a hospital's long-running end. It only calls out, to one host and port.

    supernode   Flower's SuperNode with the site's client certificate: the one connection that leaves the house
    runner      executes the application installed here; speaks to the SuperNode on loopback alone

Each is started again when it dies. A SuperNode waits for ever for the answer of a runner that died in the middle of a
task, so it is started anew with it; a runner finishes its work while its SuperNode is started anew, and answers from
its outbox. A certificate that has used two thirds of its time is renewed on the way.
"""

from __future__ import annotations

import logging
import sys
import threading
from pathlib import Path

from client.certificates import days_left
from client.keys import SiteKeys
from client.site import SiteConfig
from deploy.child import Child
from deploy.health import probe
from deploy.processes import GIVE_BACK, LOOPBACK, Events, environment, free_ports, shared_secret, teller
from deploy.renewal import renew_site, renewal_due
from deploy.supervisor import Supervisor, hold
from medsegdiff.errors import UserError
from medsegdiff.strict import read_config

log = logging.getLogger("medsegfed.supervisor")

RENEW_LOOK_SECONDS = 600.0  # between looks at the certificate's age; shorter for certificates of less than a day


def open_site_folder(folder: Path) -> tuple[SiteConfig, SiteKeys]:
    """Configuration and keys of a site that may be started.

    Raises:
        UserError: no site.yaml, no keys, or no kit.
    """
    path = folder / "site.yaml"
    config = read_config(path, SiteConfig)
    if config.keys is None:
        raise UserError(f"{path}: names no keys, so this is no site of a federation. Run medsegfed join.")
    keys = SiteKeys.load(folder / config.keys)
    keys.certificate()
    return config, keys


def site_children(folder: Path, keys: SiteKeys) -> list[Child]:
    """SuperNode and runner of one site, with free loopback ports."""
    state = folder / "state"
    runtime, health = free_ports(2)
    secret = shared_secret(state / "runner.secret")
    env = environment(state / "flower", MEDSEGFED_CERTIFICATE=str(keys.tls_file.resolve()))
    python = sys.executable
    supernode = Child(
        name="supernode",
        command=(
            python, "-m", "client.supernode",
            "--superlink", keys.membership().server,
            "--root-certificates", str(keys.ca_file.resolve()),
            "--auth-supernode-private-key", str(keys.node_key_file.resolve()),
            "--isolation", "process",
            "--superexec-auth-secret-file", str(secret.resolve()),
            "--host", LOOPBACK,
            "--port", str(runtime),
            "--health-server-address", f"{LOOPBACK}:{health}",
        ),
        log=state / "logs" / "supernode.log",
        env=env | GIVE_BACK,
        ready=lambda: probe(f"{LOOPBACK}:{health}"),
    )  # fmt: skip
    runner = Child(
        name="runner",
        command=(
            python, "-m", "client.runner", str((folder / "site.yaml").resolve()),
            "--node", f"{LOOPBACK}:{runtime}",
            "--secret", str(secret.resolve()),
        ),
        log=state / "logs" / "runner.log",
        env=env,
        after=("supernode",),
        restart_with=("supernode",),
    )  # fmt: skip
    return [supernode, runner]


class Renewal:
    """Renews a site's certificate once two thirds of its time have passed, and tries again until it is done."""

    def __init__(self, folder: Path, keys: SiteKeys, events: Events) -> None:
        self.folder, self.keys, self.tell = folder, keys, events
        self._stop = threading.Event()

    def start(self) -> None:
        """Look after it in a thread until `stop`."""
        threading.Thread(target=self._serve, name="renewal", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _serve(self) -> None:
        while not self._stop.wait(self.look()):
            pass

    def look(self) -> float:
        """Renew if it is time; returns the seconds until the next look."""
        try:
            certificate = self.keys.certificate()
        except (UserError, OSError) as error:
            self.tell("not_renewed", {"reason": str(error)})
            return RENEW_LOOK_SECONDS
        life = (certificate.not_valid_after_utc - certificate.not_valid_before_utc).total_seconds()
        pause = min(RENEW_LOOK_SECONDS, life / 20)
        if not renewal_due(certificate):
            return pause
        try:
            renew_site(self.folder)
            self.tell("renewed", {})
        except Exception as error:  # whatever it was, it is tried again
            self.tell("not_renewed", {"days_left": round(days_left(certificate), 4), "reason": str(error)})
        return pause


def start_site(folder: Path, events: Events) -> None:
    """Run a site until SIGTERM or SIGINT.

    Args:
        events: told what happens, beside the journal in state/supervisor.jsonl.

    Raises:
        UserError: as `open_site_folder`; the certificate has expired; or another process runs this site.
    """
    folder = folder.resolve()
    _, keys = open_site_folder(folder)
    certificate = keys.certificate()
    if days_left(certificate) <= 0:
        raise UserError(
            f"the site's certificate expired on {certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, so it would be"
            " turned away. Run medsegfed join NAME --patients N again and send the request; the keys stay."
        )
    with hold(folder / "state" / "lock"):
        pass  # a second site process would renew the certificate beside the first
    tell = teller(folder / "state" / "supervisor.jsonl", events)
    renewal = Renewal(folder, keys, tell)
    supervisor = Supervisor(site_children(folder, keys), tell, state=folder / "state")
    renewal.start()
    try:
        supervisor.run()
    finally:
        renewal.stop()
