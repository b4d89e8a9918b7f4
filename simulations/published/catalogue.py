"""The published datasets that can be imported, by name."""

from __future__ import annotations

from medsegdiff.errors import UserError
from simulations.published.brats import BRATS2020, BRATS2021
from simulations.published.btcv import BTCV, SYNAPSE8
from simulations.published.cvc_clinicdb import CVC_CLINICDB
from simulations.published.ddti import DDTI
from simulations.published.glas import GLAS
from simulations.published.isic import ISIC2018
from simulations.published.kits import KITS19, KITS21, KITS23
from simulations.published.layout import Published
from simulations.published.lidc import LIDC
from simulations.published.promise12 import PROMISE12
from simulations.published.prostatex import PROSTATEX
from simulations.published.refuge import REFUGE

PUBLISHED: dict[str, Published] = {
    "isic2018": ISIC2018,
    "refuge": REFUGE,
    "lidc": LIDC,
    "cvc_clinicdb": CVC_CLINICDB,
    "glas": GLAS,
    "ddti": DDTI,
    "btcv": BTCV,
    "synapse8": SYNAPSE8,
    "kits19": KITS19,
    "kits21": KITS21,
    "kits23": KITS23,
    "brats2020": BRATS2020,
    "brats2021": BRATS2021,
    "promise12": PROMISE12,
    "prostatex": PROSTATEX,
}


def published(name: str) -> Published:
    """The dataset of that name. Raises UserError with the known names."""
    if name not in PUBLISHED:
        raise UserError(
            f"'{name}' is no published dataset that is known here, so nothing was imported; known are "
            f"{', '.join(PUBLISHED)}. Any other one needs a cases.csv and a dataset.yaml of its own "
            "(docs/configuration.md)."
        )
    return PUBLISHED[name]


def catalogue_lines() -> list[str]:
    """Every dataset for a person: its name and title, and where to get it."""
    return [f"{name}: {dataset.title}. {dataset.source}" for name, dataset in PUBLISHED.items()]
