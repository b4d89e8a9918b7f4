"""The doctor at the coordinator's machine: the federation's folder, its programs, its ports."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from cryptography import x509

from client.certificates import days_left, expiry_warning, read_certificate
from deploy.credentials import certified_hosts
from deploy.doctor.checks import Check, Names, Probe, counted, reason_of, run_probes, within
from deploy.doctor.credentials import check_modes, judge_days
from deploy.doctor.machine import check_disk, check_environment, check_versions, check_writable, model_bytes
from deploy.doctor.network import issued_by
from deploy.doctor.site import HEAVY_SECONDS, audit_check, processes_check
from deploy.federation import Federation, open_federation
from deploy.supervisor import read_status
from medsegdiff.config import ModelConfig
from medsegdiff.errors import UserError
from medsegdiff.strict import load_yaml, parse_config
from server.members import moment

FLOWER = ("flower-superlink", "flower-superexec")
PROGRAM_SECONDS = 5.0


@dataclass
class Examined:
    """The federation that is examined."""

    folder: Path
    now: Callable[[], float]

    @cached_property
    def federation(self) -> Federation:
        """Raises UserError."""
        return open_federation(self.folder)

    @property
    def moment(self) -> datetime:
        return datetime.fromtimestamp(self.now(), UTC)


def examine_federation(folder: Path, now: Callable[[], float] = time.time) -> list[Check]:
    """Every check of a federation's folder and machine. `now`: the clock, seconds since 1970."""
    own, names = Examined(folder, now), Names()
    hidden = [str(folder.resolve()), str(folder)]
    first = run_probes([Probe("federation.yaml", lambda: [_config_check(own)])], names, hidden)
    if first[0].status == "fail":
        return first + run_probes([Probe("environment", lambda: [check_environment()])], names, hidden)
    return first + run_probes(_probes(own), names, hidden)


def _probes(own: Examined) -> list[Probe]:
    federation = own.federation
    return [
        Probe("keys", lambda: [_keys_check(federation)]),
        Probe("certificates", lambda: [_certificates_check(own)]),
        Probe("hosts", lambda: [_hosts_check(federation)], 15.0),
        Probe("revocation list", lambda: [_revocation_check(federation)]),
        Probe("members", lambda: [_members_check(own)]),
        Probe("programs", lambda: [_programs_check()], 4 * PROGRAM_SECONDS),
        Probe("versions", lambda: [check_versions()]),
        Probe("ports", lambda: [_ports_check(federation)]),
        Probe("processes", lambda: [processes_check(federation.state, "medsegfed server start")]),
        Probe("audit log", lambda: [audit_check(federation.audit_file, "federation_created")], HEAVY_SECONDS),
        Probe("clock", lambda: [clock_kept()], 3 * PROGRAM_SECONDS),
        Probe("environment", lambda: [check_environment()]),
        Probe("folders", lambda: [check_writable(_folders(federation))]),
        Probe("runs", lambda: [_runs_check(federation)], HEAVY_SECONDS),
    ]


def _config_check(own: Examined) -> Check:
    try:
        config = own.federation.config
    except UserError as error:
        reason = reason_of(error, Names(), [str(own.folder.resolve()), str(own.folder)])
        return Check("federation.yaml", "fail", reason, "Mend that key.")
    fact = f"{config.name}: reached at {own.federation.server}, {counted(len(config.hosts), 'host name')}"
    return Check("federation.yaml", "ok", fact)


def _keys_check(federation: Federation) -> Check:
    secret = [federation.ca_key, federation.server_key]
    missing = [path.name for path in secret if not path.is_file()]
    if missing:
        return Check("keys", "fail", f"{', '.join(missing)} not there", "Restore the folder from a backup.")
    secret += [path for path in federation.state.glob("*secret*") if path.is_file()]
    if loose := check_modes("keys", [federation.folder, federation.ca_key.parent], secret):
        return loose
    authority = federation.authority()  # raises UserError where key, certificate and name do not belong together
    fact = f"{counted(len(secret), 'secret file')} can be read by their owner alone; the authority's key fits"
    return Check("keys", "ok", fact, figures={"authority": authority.fingerprint})


def _certificates_check(own: Examined) -> Check:
    """Days, issuer and host names of the server's certificate; days of the authority's."""
    name, federation = "certificates", own.federation
    server, authority = read_certificate(federation.server_crt), read_certificate(federation.ca_crt)
    if not issued_by(server, authority):
        fact = "the server's certificate was not issued by this federation's authority"
        return Check(name, "fail", fact, "Make it anew: medsegfed renew.")
    lacking = [host for host in federation.config.hosts if host.lower() not in certified_hosts(server)]
    if lacking:
        fact = f"the server's certificate lacks {', '.join(lacking)}, which federation.yaml names"
        return Check(name, "fail", fact, "Make it anew: medsegfed renew. Sites that use these names cannot connect.")
    days = [("the server's", days_left(server, own.moment)), ("the authority's", days_left(authority, own.moment))]
    early = server.not_valid_before_utc > own.moment
    return judge_days(name, days, "Make the server's anew: medsegfed renew; the running gateway takes it up.", early)


def _hosts_check(federation: Federation) -> Check:
    """Whether the names that sites dial are known to DNS, as seen from here."""
    unknown = []
    for host in federation.config.hosts:
        try:
            within(PROGRAM_SECONDS, lambda host=host: socket.getaddrinfo(host, None))  # type: ignore[misc]
        except (OSError, UnicodeError):  # TimeoutError is one
            unknown.append(host)
    figures = {"hosts": len(federation.config.hosts), "unknown": len(unknown)}
    if unknown:
        fact = (
            f"not in DNS: {len(unknown)} of {counted(len(federation.config.hosts), 'host name')} ({', '.join(unknown)})"
        )
        return Check("hosts", "warn", fact, "Sites must be able to look them up; enter them into the DNS.", figures)
    return Check("hosts", "ok", f"{counted(len(federation.config.hosts), 'host name')} found in DNS", figures=figures)


def _revocation_check(federation: Federation) -> Check:
    """That the list is the authority's, and names every revoked certificate of the register."""
    name = "revocation list"
    try:
        found = x509.load_pem_x509_crl(federation.ca_crl.read_bytes())
        sound = found.is_signature_valid(read_certificate(federation.ca_crt).public_key())  # type: ignore[arg-type]
    except (OSError, ValueError, TypeError):
        sound = False
    again = "Revoke once more, which writes it anew: medsegfed revoke SITE --reason TEXT."
    if not sound:
        return Check(name, "fail", "ca.crl is missing, damaged, or not signed by the authority", again)
    listed = {f"{entry.serial_number:x}" for entry in found}
    due = {serial for member in federation.members().values() for serial in member.revoked}
    if due - listed:
        fact = f"lacks {len(due - listed)} of {counted(len(due), 'revoked certificate')}: the gateway lets them in"
        return Check(name, "fail", fact, again)
    return Check(name, "ok", f"signed by the authority, names {counted(len(listed), 'certificate')}")


def _members_check(own: Examined) -> Check:
    """Who belongs, and the days left on their certificates."""
    members = own.federation.members()
    admitted = {site: member for site, member in members.items() if member.active}
    left = {site: (moment(m.not_after) - own.moment).total_seconds() / 86_400 for site, m in admitted.items()}
    late = {site: days for site, days in left.items() if expiry_warning(days) is not None}
    over = [site for site, days in left.items() if days <= 0]
    counts = {
        status: sum(m.status == status for m in members.values()) for status in ("admitted", "suspended", "revoked")
    }
    figures = counts | {"ending": len(late), "expired": len(over)}
    fact = ", ".join(f"{number} {status}" for status, number in counts.items())
    if not admitted:
        return Check(
            "members", "warn", f"{fact}: nobody can take part", "Admit a site: medsegfed admit FILE.request.", figures
        )
    if late:
        first = sorted(late, key=lambda site: late[site])[:5]
        fact += f"; certificates that end soon: {', '.join(f'{site} {_days(late[site])}' for site in first)}"
        fact += f" and {len(late) - 5} more" if len(late) > 5 else ""
        advice = (
            "A running site renews its own at two thirds of its time: is it running? An expired one needs a new kit."
        )
        return Check("members", "warn", fact, advice, figures)
    soonest = min(left.values())
    return Check("members", "ok", f"{fact}; the first certificate ends in {soonest:,.0f} days", figures=figures)


def _days(days: float) -> str:
    return f"({days:.1f} days)" if days > 0 else "(expired)"


def _programs_check(search: str | None = None) -> Check:
    """nginx, as the gateway wants it, and Flower's programs.

    Args:
        search: like PATH, for Flower's; default: the folder of this Python, then PATH.
    """
    beside = str(Path(sys.executable).parent)
    search = os.pathsep.join([beside, os.environ.get("PATH", os.defpath)]) if search is None else search
    missing = [name for name in FLOWER if shutil.which(name, path=search) is None]
    if missing:
        fact = f"{' and '.join(missing)} not found beside this Python"
        return Check("programs", "fail", fact, "Install medsegfed anew, with its own Flower: pip install medsegfed.")
    from deploy.gateway import INSTALL, require_programs

    try:
        nginx = require_programs()
    except UserError as error:
        return Check("programs", "fail", str(error), f"On Debian and Ubuntu: {INSTALL}")
    version = ".".join(map(str, nginx.version))
    return Check(
        "programs", "ok", f"nginx {version} and {counted(len(FLOWER), 'program')} of Flower", "", {"nginx": version}
    )


def _ports_check(federation: Federation) -> Check:
    """The public port and the loopback ones: free, or held by this federation's own processes."""
    running = read_status(federation.state) is not None
    wanted = [("", federation.config.port), *(("127.0.0.1", port) for port in federation.ports)]
    held, forbidden = [], []
    for host, port in wanted:
        fault = _bind_fault(host, port)
        held += [port] if fault == errno.EADDRINUSE else []
        forbidden += [port] if fault == errno.EACCES else []
    figures = {"ports": len(wanted), "in_use": len(held), "running": running}
    if forbidden:
        fact = f"port {forbidden[0]} may be opened by root alone"
        return Check("ports", "fail", fact, "Choose a port from 1024 on, or give nginx CAP_NET_BIND_SERVICE.", figures)
    if running:
        if federation.config.port not in held:
            fact = f"the server runs, but nothing listens on port {federation.config.port}"
            return Check("ports", "fail", fact, "See state/logs for why nginx does not start.", figures)
        return Check(
            "ports",
            "ok",
            f"{len(held)} of {counted(len(wanted), 'port')} in use by the running server",
            figures=figures,
        )
    if held:
        numbers = ", ".join(map(str, held))
        fact = f"{counted(len(held), 'port')} in use by another program: {numbers}"
        advice = f"Who it is: sudo ss -ltnp 'sport = :{held[0]}'. End it, or change port or internal_port."
        return Check("ports", "fail", fact, advice, figures)
    fact = f"port {federation.config.port} and {counted(len(wanted) - 1, 'loopback port')} are free"
    return Check("ports", "ok", fact, figures=figures)


def _bind_fault(host: str, port: int) -> int | None:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # what is in TIME_WAIT is free
        try:
            trial.bind((host, port))
            trial.listen()
        except OSError as error:
            return error.errno
    return None


def clock_kept(command: str = "timedatectl") -> Check:
    """Whether a time server keeps this machine's clock, where systemd tells."""
    program = shutil.which(command)
    if program is not None:
        with suppress(OSError, subprocess.TimeoutExpired):
            told = subprocess.run(
                [program, "show", "--property=NTPSynchronized", "--value"],
                capture_output=True,
                text=True,
                timeout=PROGRAM_SECONDS,
                check=False,
            ).stdout.strip()
            if told == "yes":
                return Check("clock", "ok", "kept by a time server (NTP)")
            if told == "no":
                advice = "sudo timedatectl set-ntp true; sites more than 5 s ahead of this machine are refused."
                return Check("clock", "warn", "not kept by a time server (NTP)", advice)
    return Check("clock", "skipped", "this system does not tell (timedatectl); compare the clock with a time server")


def _folders(federation: Federation) -> dict[str, Path]:
    return {
        "federation": federation.folder,
        "runs": federation.runs,
        "state": federation.state,
        "kits": federation.kits,
        "requests": federation.requests,
        "server": federation.server_crt.parent,
    }


def _runs_check(federation: Federation) -> Check:
    """Room for checkpoints: of the largest model among the runs that are there."""
    models = list(_models(federation.runs))
    return check_disk("disk", federation.runs, model_bytes(models), bool(models))


def _models(runs: Path) -> Iterator[ModelConfig]:
    for path in sorted(runs.glob("*/run.yaml")):
        with suppress(UserError, KeyError, TypeError):  # a damaged plan is told by medsegfed status
            yield parse_config(load_yaml(path)["task"]["model"], ModelConfig, str(path))
