"""A site's keys and certificates: there, readable by nobody else, belonging together, and valid for how long.

All faults of one kind are counted at once, where opening the keys would stop at the first.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509

from client.certificates import days_left, expiry_warning, name_in, read_certificate
from client.keys import KEY_FILES, SiteKeys
from deploy.doctor.checks import Check, counted, without_names
from deploy.doctor.network import issued_by
from medsegdiff.errors import UserError

WRITTEN_BY_KIT = ("ca.crt", "federation.json")


def check_keys(folder: Path) -> Check:
    """Key files present, mode 0600 in a folder of mode 0700, and private halves that fit the public ones."""
    missing = [name for name in KEY_FILES if not (folder / name).is_file()]
    figures = {"files": len(KEY_FILES), "missing": len(missing)}
    if len(missing) == len(KEY_FILES):
        return Check(
            "keys", "fail", "the site has no keys yet", "Make them: medsegfed join NAME --patients N.", figures
        )
    if missing:
        advice = "Restore keys/ from a backup; else move it away, run medsegfed join, and tell the coordinator."
        return Check("keys", "fail", f"{len(missing)} of {len(KEY_FILES)} key files are missing", advice, figures)
    if loose := check_modes("keys", [folder], [folder / name for name in KEY_FILES]):
        return loose
    try:
        SiteKeys.load(folder)
    except UserError as error:
        return Check("keys", "fail", without_names(str(error), [str(folder)]), "Restore keys/ from a backup.", figures)
    return Check(
        "keys", "ok", f"{len(KEY_FILES)} key files fit together, and only their owner may read them", "", figures
    )


def check_modes(name: str, folders: Iterable[Path], files: Iterable[Path]) -> Check | None:
    """The failed check where others than the owner may read what is secret; None where all is well."""
    secret = [path for path in (*folders, *files) if path.exists()]
    loose = [path for path in secret if stat.S_IMODE(path.stat().st_mode) & 0o077]
    if not loose:
        return None
    fact = f"{len(loose)} of {counted(len(secret), 'secret file')} or folders may be read or changed by other accounts"
    advice = "Run chmod 700 on the folders and chmod 600 on the files; could somebody have copied them? Make new keys."
    return Check(name, "fail", fact, advice, {"secret": len(secret), "loose": len(loose)})


def check_certificates(folder: Path, site: str, now: float) -> Check:
    """The site's certificate and the authority's: whose, by whom, for which key, and for how many days.

    Args:
        site: the name in site.yaml.
        now: seconds since 1970.
    """
    name = "certificates"
    if not all((folder / file).is_file() for file in WRITTEN_BY_KIT):
        advice = "Send the request of medsegfed join to the coordinator; then medsegfed join --kit FILE."
        return Check(name, "fail", "no kit is installed, so there is no federation to reach", advice)
    anew = "Install the site's kit once more: medsegfed join --kit FILE."
    try:
        keys = SiteKeys.load(folder)
        own, authority, member = keys.certificate(), read_certificate(keys.ca_file), keys.membership()
    except UserError as error:
        return Check(name, "fail", without_names(str(error), [str(folder)]), anew)
    common_name = name_in(own, x509.NameOID.COMMON_NAME)
    if {common_name, member.site} != {site}:
        fact = f"certificate of {common_name}, kit of {member.site}, site.yaml of {site}: three names must be one"
        return Check(name, "fail", fact, "Put the enrolled name into site.yaml, or install this site's own kit.")
    if not issued_by(own, authority):
        return Check(name, "fail", "the site's certificate was not issued by the authority in keys/ca.crt", anew)
    moment = datetime.fromtimestamp(now, UTC)
    days = [("the site's", days_left(own, moment)), ("the authority's", days_left(authority, moment))]
    renew = "A running site renews its own certificate; now: medsegfed renew."
    return judge_days(name, days, renew, early=own.not_valid_before_utc > moment)


def judge_days(name: str, days: Sequence[tuple[str, float]], advice: str, early: bool = False) -> Check:
    """One check over several certificates: the one that ends first decides. Warnings at 30, 7 and 1 days.

    Args:
        days: (whose, days left).
        early: one of them is not valid yet.
    """
    whose, left = min(days, key=lambda pair: pair[1])
    figures = {
        label.removesuffix("'s").removeprefix("the ").replace(" ", "_") + "_days": round(d, 3) for label, d in days
    }
    fact = ", ".join(f"{label} {span(d)}" for label, d in days)
    if left <= 0:
        return Check(name, "fail", f"{whose} certificate has expired: {fact}", advice, figures)
    if early:
        return Check(
            name, "fail", "the certificate is not valid yet by this machine's clock", "Set the clock (NTP).", figures
        )
    if (limit := expiry_warning(left)) is not None:
        return Check(name, "warn", f"{whose} certificate ends within {counted(limit, 'day')}: {fact}", advice, figures)
    return Check(name, "ok", f"valid: {fact}", figures=figures)


def span(days: float) -> str:
    """`89 days`, `5.0 hours`, `40 s`, or `expired 3 days ago`."""
    if days <= 0:
        return f"expired {span(-days)} ago" if days < 0 else "expired"
    if days >= 2:
        return f"{days:,.0f} days"
    return f"{24 * days:.1f} hours" if days * 24 >= 1 else f"{86_400 * days:.0f} s"
