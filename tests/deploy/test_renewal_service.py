"""The route behind the gateway: who may ask, how much, and what is told."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from deploy import renewal_service
from deploy.gateway import RENEWAL_PATH, SECRET_HEADER, SITE_HEADER
from deploy.processes import free_ports
from deploy.renewal import RenewalRefused
from deploy.renewal_service import LARGEST, serve_renewals
from medsegdiff.errors import UserError

SECRET = "5" * 64
Ask = Callable[..., tuple[int, Any]]


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """Call to POST to the service; the certificate that it gives tells who asked and with what."""

    def answer(federation: object, site: str, body: bytes) -> bytes:
        if body == b"refuse":
            raise RenewalRefused("revoked")
        if body == b"broken":
            raise UserError("/secret/path: the authority's key is gone.")
        return json.dumps([site, len(body)]).encode()

    monkeypatch.setattr(renewal_service, "answer_renewal", answer)
    (port,) = free_ports(1)
    server = serve_renewals(None, port, SECRET)  # type: ignore[arg-type]

    def post(body: bytes = b"{}", path: str = RENEWAL_PATH, method: str = "POST", **headers: str) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        sent = {SECRET_HEADER: SECRET, SITE_HEADER: "alder"} | {k.replace("_", "-"): v for k, v in headers.items()}
        connection.request(method, path, body, {name: value for name, value in sent.items() if value})
        reply = connection.getresponse()
        text = reply.read()
        connection.close()
        return reply.status, json.loads(text) if text.startswith((b"{", b"[")) else text

    yield post
    server.shutdown()
    server.server_close()


def test_the_gateway_s_site_is_the_one_that_is_renewed(ask: Ask) -> None:
    """Site and body reach the renewal as they came."""
    assert ask(b"x" * 100) == (200, ["alder", 100])


@pytest.mark.parametrize("secret", ["", "0" * 64, SECRET[:-1]])
def test_another_process_of_the_machine_is_turned_away(ask: Ask, secret: str) -> None:
    """Without the gateway's secret, or with a guess."""
    status, said = ask(**{SECRET_HEADER: secret})
    assert (status, said) == (403, {"reason": "only the gateway may ask"})


def test_other_routes_methods_and_sizes_are_refused(ask: Ask) -> None:
    """Nothing is read of a body that says it is too large, or does not say how large it is."""
    assert ask(path="/other")[0] == 404
    assert ask(b"x" * (LARGEST + 1))[0] == 413
    assert ask(Content_Length="many")[0] in (400, 413)
    assert ask(method="GET")[0] == 501


def test_a_refusal_says_why_and_a_fault_of_ours_says_no_path(ask: Ask) -> None:
    """What the site may know, and what it may not."""
    assert ask(b"refuse") == (403, {"reason": "revoked"})
    status, said = ask(b"broken")
    assert status == 500
    assert "secret" not in json.dumps(said)
