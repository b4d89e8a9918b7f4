"""The server's answer to sites that renew their certificates: one route, on loopback, behind the gateway.

The gateway has verified the certificate and says whose it is. That it is the gateway who says so a shared secret shows:
any process of this machine can reach the port.
"""

from __future__ import annotations

import hmac
import json
import logging
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from deploy.federation import Federation
from deploy.gateway import RENEWAL_PATH, SECRET_HEADER, SITE_HEADER
from deploy.renewal import RenewalRefused, answer_renewal
from medsegdiff.errors import UserError

log = logging.getLogger("medsegfed.supervisor")

LARGEST = 64 * 1024  # a signing request takes one or two kB
SECONDS = 20.0  # for one request


def serve_renewals(federation: Federation, port: int, secret: str) -> ThreadingHTTPServer:
    """Serve in a thread until `shutdown` of what is returned. Raises OSError when the port is taken."""

    class Handler(BaseHTTPRequestHandler):
        timeout = SECONDS
        protocol_version = "HTTP/1.1"
        server_version, sys_version = "medsegfed", ""

        def do_POST(self) -> None:
            self.close_connection = True
            length = self.headers.get("Content-Length", "")
            if not hmac.compare_digest(self.headers.get(SECRET_HEADER, "").encode(), secret.encode()):
                self._answer(403, {"reason": "only the gateway may ask"})
            elif self.path != RENEWAL_PATH:
                self._answer(404, {"reason": "there is nothing here"})
            elif not (length.isascii() and length.isdigit()) or int(length) > LARGEST:
                self._answer(413, {"reason": f"a renewal has at most {LARGEST} bytes"})
            else:
                self._renew(self.headers.get(SITE_HEADER, ""), self.rfile.read(int(length)))

        def _renew(self, site: str, body: bytes) -> None:
            try:
                answer = answer_renewal(federation, site, body)
            except RenewalRefused as refused:
                log.warning("%s: not renewed: %s", site, refused)
                self._answer(403, {"reason": str(refused)})
            except UserError as error:
                log.error("%s: not renewed: %s", site, error)
                self._answer(500, {"reason": "the server cannot renew now; its own log says why"})
            else:
                log.info("%s: certificate renewed", site)
                self._send(200, answer)

        def _answer(self, status: int, said: dict[str, str]) -> None:
            self._send(status, json.dumps(said).encode())

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "close")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """The gateway's access log tells every request."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, name="renewals", daemon=True).start()
    return server
