"""A site's no: a word and a fixed sentence for the server, the reason for the site's own people."""

from __future__ import annotations

from client.contract import REFUSALS
from medsegdiff.errors import UserError


class Refusal(UserError):
    """The site does not do what it was asked.

    Its text may say anything but names of files and patients, and stays at the site. All that the server may be told is
    `outward`: the code and the contract's sentence for it.
    """

    def __init__(self, code: str, message: str) -> None:
        if code not in REFUSALS:
            raise ValueError(f"{code!r} is none of the contract's refusals")
        super().__init__(message)
        self.code = code

    @property
    def outward(self) -> str:
        """What may leave the site."""
        return f"{self.code}: {REFUSALS[self.code]}"
