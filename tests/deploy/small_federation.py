"""A federation with members on disk, for tests of what happens among them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from client.keys import SiteKeys
from deploy.admission import admit
from deploy.documents import document, signed_part
from deploy.federation import Federation, init_federation, open_federation
from deploy.joining import install_kit, make_request


def new_federation(folder: Path, name: str = "demo", **options: Any) -> Federation:
    """At 127.0.0.1, port 8443 unless told otherwise."""
    return init_federation(folder, name, **{"hosts": ["127.0.0.1"], "port": 8443, **options})


def join(federation: Federation, folder: Path, site: str = "alder", now: datetime | None = None) -> Path:
    """Make the site's keys, have it admitted, install its kit; returns its folder."""
    request = make_request(folder, site, 12).request
    install_kit(folder, admit(federation, request, now=now), now=now)
    return folder


def keys_of(folder: Path) -> SiteKeys:
    return SiteKeys.load(folder / "keys")


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any], sign: Callable[[bytes], bytes] | None = None) -> Path:
    """Change a document's fields; with `sign`, put a new `signature` on it."""
    data = json.loads(path.read_bytes())
    change(data)
    if sign is not None:
        data["signature"] = sign(signed_part(data)).hex()
    path.write_bytes(document(data))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, lock files left out."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if not name.endswith(".lock")}


@dataclass(frozen=True)
class Template:
    """A federation, and a site `alder` that has asked to join; to be copied, since making keys takes time."""

    folder: Path

    def federation(self, target: Path) -> Federation:
        shutil.copytree(self.folder / "federation", target)
        return open_federation(target)

    def asked(self, target: Path) -> Path:
        shutil.copytree(self.folder / "alder", target)
        return target


def make_template(folder: Path) -> Template:
    new_federation(folder / "federation")
    make_request(folder / "alder", "alder", 12)
    return Template(folder)
