"""A web server on the loopback interface that answers well and badly."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def serving(image: bytes) -> Iterator[tuple[str, list[str]]]:
    """Serve an image at /image.png, and trouble at the other paths; gives the address and the paths asked for."""
    asked: list[str] = []

    class Handler(_Handler):
        content, seen = image, asked

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    content = b""
    seen: list[str]

    def do_GET(self) -> None:
        self.seen.append(self.path)
        kind = self.path.strip("/").partition(".")[0].partition("?")[0]
        getattr(self, f"answer_{kind}", self.answer_missing)()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def begin(self, status: int = 200, **headers: Any) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def answer_image(self) -> None:
        self.begin(content_type="image/png", content_length=len(self.content))
        self.wfile.write(self.content)

    def answer_missing(self) -> None:
        self.begin(404, content_length=0)

    def answer_page(self) -> None:
        self.begin(content_type="text/html; charset=utf-8", content_length=14)
        self.wfile.write(b"<html>no</html>"[:14])

    def answer_words(self) -> None:
        self.begin(content_type="image/png", content_length=5)
        self.wfile.write(b"words")

    def answer_moved(self) -> None:
        self.begin(302, location="/image.png", content_length=0)

    def answer_circle(self) -> None:
        self.begin(302, location="/circle", content_length=0)

    def answer_elsewhere(self) -> None:
        self.begin(302, location="file:///etc/passwd", content_length=0)

    def answer_huge(self) -> None:
        self.begin(content_length=10**10)

    def answer_endless(self) -> None:
        self.begin()
        try:
            while True:
                self.wfile.write(bytes(2**20))
        except OSError:  # the client has had enough
            self.close_connection = True

    def answer_cut(self) -> None:
        self.begin(content_length=len(self.content))
        self.wfile.write(self.content[:100])
        self.close_connection = True

    def answer_silent(self) -> None:
        time.sleep(1.5)
        self.begin(content_length=0)
