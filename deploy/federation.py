"""A federation on the coordinator's machine: one folder, federation.yaml in it, and where everything else lies.

federation.yaml     what the coordinator edits
guide.md            one page for the sites
ca/                 ca.crt, ca.key (the authority), ca.crl (certificates that were revoked)
server/             server.crt, server.key
members.json        who belongs; audit.jsonl (+ .head): what was decided, in a chain
requests/ kits/     what sites sent, what they were given
runs/ state/        runs; what the running server needs and can make anew
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from cryptography.hazmat.primitives.asymmetric import ec

from client.certificates import certificate_pem, private_pem, spoken
from deploy.authority import CA_DAYS, MAX_SERVER_DAYS, MAX_SITE_DAYS, Authority, check_hosts
from deploy.site_guide import site_guide
from medsegdiff.chained_log import AUDIT_LOG, ChainedLog
from medsegdiff.errors import UserError
from medsegdiff.files import FOLDER_NAME, new_folder, write_atomic
from medsegdiff.strict import Strict, read_config
from server.members import Member, iso, read_members

CONFIG = "federation.yaml"
SECRET = 0o600
SHORTEST_DAYS = 10 / 86_400  # ten seconds: for tests and drills


class Ports(NamedTuple):
    """Of the server's processes, all on loopback."""

    superlink: int
    superlink_health: int
    superexec_health: int
    renewal: int
    metrics: int
    health: int


@dataclass(frozen=True)
class LimitsConfig(Strict):
    """What one site may ask of the server; Flower sends weights in pieces of 5 MiB, two at a time."""

    body_mib: int = 8  # largest request
    connections_per_site: int = 16
    requests_per_second: int = 50

    def __post_init__(self) -> None:
        _in_range("body_mib", self.body_mib, 6, 1024)
        _in_range("connections_per_site", self.connections_per_site, 2, 10_000)
        _in_range("requests_per_second", self.requests_per_second, 1, 100_000)


@dataclass(frozen=True)
class FederationConfig(Strict):
    """federation.yaml: what the coordinator writes."""

    name: str  # stands in every certificate; fixed once there are members
    hosts: tuple[str, ...]  # host names or IP addresses that sites reach the server by; the first stands in the kits
    port: int = 8443  # the only one that is open to the outside
    internal_port: int = 18100  # this and the next ones: the server's processes among themselves, on loopback
    site_days: float = 90.0  # that a site's certificate is valid; a fraction of a day for drills
    server_days: float = 365.0
    limits: LimitsConfig = field(default_factory=LimitsConfig)

    def __post_init__(self) -> None:
        if not FOLDER_NAME.fullmatch(self.name):
            raise ValueError(
                f"name {self.name!r} must be 1 to 64 letters, digits, '-', '_' or '.': it is in certificates"
            )
        try:
            check_hosts(self.hosts)
        except UserError as error:
            raise ValueError(str(error)) from None
        _in_range("port", self.port, 1, 65_535)
        _in_range("internal_port", self.internal_port, 1024, 65_536 - len(Ports._fields))
        if self.internal_port <= self.port < self.internal_port + len(Ports._fields):
            raise ValueError(
                f"port {self.port} is one of the internal ports {self.internal_port}.."
                f"{self.internal_port + len(Ports._fields) - 1}; choose another"
            )
        _in_range("site_days", self.site_days, SHORTEST_DAYS, MAX_SITE_DAYS)
        _in_range("server_days", self.server_days, SHORTEST_DAYS, MAX_SERVER_DAYS)


class Federation:
    """An existing federation. `open_federation` checks that there is one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def config(self) -> FederationConfig:
        """federation.yaml. Raises UserError with the key that is wrong."""
        return read_config(self.config_file, FederationConfig)

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def server(self) -> str:
        """host:port that sites connect to."""
        return address(self.config.hosts[0], self.config.port)

    @property
    def ports(self) -> Ports:
        """The loopback ports, counted up from internal_port."""
        return Ports(*range(self.config.internal_port, self.config.internal_port + len(Ports._fields)))

    @property
    def config_file(self) -> Path:
        return self.folder / CONFIG

    @property
    def guide(self) -> Path:
        return self.folder / "guide.md"

    @property
    def ca_crt(self) -> Path:
        return self.folder / "ca" / "ca.crt"

    @property
    def ca_key(self) -> Path:
        return self.folder / "ca" / "ca.key"

    @property
    def ca_crl(self) -> Path:
        return self.folder / "ca" / "ca.crl"

    @property
    def server_crt(self) -> Path:
        return self.folder / "server" / "server.crt"

    @property
    def server_key(self) -> Path:
        return self.folder / "server" / "server.key"

    @property
    def members_file(self) -> Path:
        return self.folder / "members.json"

    @property
    def audit_file(self) -> Path:
        return self.folder / AUDIT_LOG

    @property
    def requests(self) -> Path:
        return self.folder / "requests"

    @property
    def kits(self) -> Path:
        return self.folder / "kits"

    @property
    def runs(self) -> Path:
        return self.folder / "runs"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def renewals(self) -> Path:
        """The answer that each site was given last when it renewed its certificate."""
        return self.state / "renewals"

    def kit(self, site: str) -> Path:
        """Where a site's kit lies."""
        return self.kits / f"{site}.kit"

    def members(self) -> dict[str, Member]:
        """Site -> entry, as the register says at this moment."""
        return read_members(self.members_file)

    def audit(self) -> ChainedLog:
        """What was decided."""
        return ChainedLog(self.audit_file)

    def authority(self) -> Authority:
        """The certificate authority, with its key.

        Raises:
            UserError: its files are missing or damaged, or federation.yaml bears another name than they do.
        """
        found = Authority.load(self.ca_crt, self.ca_key)
        if found.federation != self.name:
            raise UserError(
                f"{self.config_file}: name is {self.name}, but the authority certifies for {found.federation}; nothing "
                f"was signed. Write name: {found.federation} again, or make a new federation."
            )
        return found


def init_federation(
    folder: Path,
    name: str,
    hosts: Sequence[str],
    port: int = 8443,
    internal_port: int = 18100,
    site_days: float = 90.0,
    server_days: float = 365.0,
    contact: str = "",
) -> Federation:
    """Make a federation: authority, server certificate, federation.yaml, the page for sites.

    Args:
        folder: becomes the federation, whole or not at all.
        hosts: host names and IP addresses by which sites reach the server.
        contact: whom sites phone to compare fingerprints, for the page; empty: a line to be filled in.

    Raises:
        UserError: the folder holds something, a value is out of range, or the disk refuses; nothing is left then.
    """
    if (folder / CONFIG).exists():
        raise UserError(
            f"{folder}: holds a federation already; nothing was changed. Go on with it (medsegfed admit), or choose "
            "another folder."
        )
    if len(contact) > 200 or not contact.isprintable():
        raise UserError(
            f"contact {contact[:80]!r} must be at most 200 printable characters: it stands on the page for sites. "
            "Nothing was made."
        )
    try:
        check_hosts(hosts)
        config = FederationConfig(name, tuple(hosts), port, internal_port, float(site_days), float(server_days))
    except (UserError, ValueError) as error:
        raise UserError(f"{str(error).removesuffix('.')}. Nothing was made.") from error
    with new_folder(folder) as partial:
        partial.chmod(0o700)
        _write_federation(Federation(partial), config, contact)
    return open_federation(folder)


def _write_federation(federation: Federation, config: FederationConfig, contact: str) -> None:
    for part in (federation.ca_crt.parent, federation.server_crt.parent, federation.requests, federation.kits,
                 federation.runs, federation.state):  # fmt: skip
        part.mkdir(mode=0o700)
    authority = Authority.create(config.name)
    key = ec.generate_private_key(ec.SECP384R1())
    server = authority.issue_server(key.public_key(), config.hosts, config.server_days)
    write_atomic(federation.ca_key, authority.key_pem(), SECRET)
    write_atomic(federation.ca_crt, authority.certificate_pem())
    write_atomic(federation.ca_crl, authority.revocation_list([], 1))
    write_atomic(federation.server_key, private_pem(key), SECRET)
    write_atomic(federation.server_crt, certificate_pem(server))
    write_atomic(federation.config_file, _config_text(config).encode())
    reached = address(config.hosts[0], config.port)
    page = site_guide(config.name, reached, spoken(authority.fingerprint), contact)
    write_atomic(federation.guide, page.encode())
    federation.audit().append(
        "federation_created",
        federation=config.name,
        server=reached,
        ca=authority.fingerprint,
        ca_days=CA_DAYS,
        server_not_after=iso(server.not_valid_after_utc),
    )


def open_federation(folder: Path) -> Federation:
    """The federation in `folder`, its configuration checked.

    Raises:
        UserError: there is none, or federation.yaml is wrong.
    """
    federation = Federation(folder)
    if not federation.config_file.is_file():
        raise UserError(
            f"{folder}: holds no federation (there is no {CONFIG}). Name its folder with --folder, or make one: "
            "medsegfed init NAME."
        )
    _ = federation.config
    return federation


def address(host: str, port: int) -> str:
    """host:port, an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in {low:g}..{high:g}, found {value:g}")


def _config_text(config: FederationConfig) -> str:
    def number(value: float) -> str:
        return str(int(value)) if value == int(value) else repr(value)

    hosts = ", ".join(json.dumps(host) for host in config.hosts)
    limits = config.limits
    return f"""\
# The federation, for its coordinator. The server reads this at its start.

name: {json.dumps(config.name)}   # stands in every certificate: never change it once there are members

# Host names and IP addresses by which sites reach the server; all stand in its certificate. The first one is given to
# sites in their kits. After a change, make the server's certificate anew: medsegfed renew, in this folder.
hosts: [{hosts}]
port: {config.port}          # the only port that is open to the outside; sites call it, the server calls nobody

# This and the next {len(Ports._fields) - 1} ports: the server's own processes among themselves, on 127.0.0.1 alone.
internal_port: {config.internal_port}

# Days that certificates are valid. A running site renews its own; the server's: medsegfed renew, in this folder.
site_days: {number(config.site_days)}       # at most {MAX_SITE_DAYS}
server_days: {number(config.server_days)}    # at most {MAX_SERVER_DAYS}

# What one site may ask of the server, so that none can take it away from the others.
limits:
  body_mib: {limits.body_mib}                # largest request; weights travel in pieces of 5 MiB
  connections_per_site: {limits.connections_per_site}
  requests_per_second: {limits.requests_per_second}
"""
