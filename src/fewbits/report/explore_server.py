"""A server of one page, on loopback only."""

from __future__ import annotations

import errno
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from fewbits.errors import FewbitsError

LOOPBACK = "127.0.0.1"


class PageServer(ThreadingHTTPServer):
    """Answers `GET /` with a page, and everything else with 404.

    Args:
        html: the page.
        port: 0 takes any free one.

    Raises:
        FewbitsError: the port is in use, needs rights, or is no port.
    """

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, html: str, port: int) -> None:
        self.body = html.encode()
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OverflowError:
            raise FewbitsError(f"--port {port}: ports go from 0, any free one, to 65535") from None
        except OSError as error:
            why = {errno.EADDRINUSE: "is in use", errno.EACCES: "needs the rights of root"}.get(error.errno or 0)
            if why is None:
                raise
            raise FewbitsError(f"--port {port} {why}: name another, or --port 0 for any free one") from None

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: PageServer

    def do_GET(self) -> None:  # the name that http.server calls
        """Answer with the page."""
        self._answer(with_body=True)

    def do_HEAD(self) -> None:
        """Answer with the headers of the page."""
        self._answer(with_body=False)

    def _answer(self, *, with_body: bool) -> None:
        if self.path.partition("?")[0] not in ("/", "/index.html"):
            self.send_error(HTTPStatus.NOT_FOUND, "there is one page, /")
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(self.server.body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if with_body:
            self.wfile.write(self.server.body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing of each request."""
