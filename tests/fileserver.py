"""A real HTTP server on this machine that serves files, and goes wrong in whatever way it is told."""

from __future__ import annotations

import gzip
import hashlib
import re
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

BLOCK = 1 << 14


@dataclass
class FileServer:
    """What a test says and sees of the server.

    A fault is for one request, in the order in which they come: `cut N` and `reset N` end after N bytes, `hold N` stops
    there until `go` is set, `stall` sends nothing more until then, a number is a status.
    """

    port: int = 0
    scheme: str = "http"
    files: dict[str, bytes] = field(default_factory=dict)
    """By path, or by whole address where the server is used as a proxy."""
    faults: list[str] = field(default_factory=list)
    always: set[str] = field(default_factory=set)
    """Faults of every request: no-etag, last-modified, ignore-range."""
    requests: list[dict[str, str]] = field(default_factory=list)
    """Headers of each, with its path."""
    go: threading.Event = field(default_factory=threading.Event)
    holding: threading.Event = field(default_factory=threading.Event)

    def url(self, path: str) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}{path}"

    @property
    def ranges(self) -> list[str]:
        """What each request asked for."""
        return [request.get("Range", "all") for request in self.requests]


@contextmanager
def serving(certificate: Path | None = None) -> Iterator[FileServer]:
    """A server for one test; over TLS with a file that has a certificate and its key."""
    state = FileServer(scheme="https" if certificate else "http")

    class Handler(_Handler):
        server_state = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = False  # so that server_close waits for them
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield state
    finally:
        state.go.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_state: FileServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        state = self.server_state
        state.requests.append({"path": self.path, **dict(self.headers.items())})
        fault, _, number = (state.faults.pop(0) if state.faults else "").partition(" ")
        data = state.files.get(self.path)
        self.close_connection = True
        if fault.isdecimal():
            self._head(int(fault), {"Retry-After": number or "0", "Content-Length": "0"})
        elif fault == "redirect":
            self._head(302, {"Location": number, "Content-Length": "0"})
        elif fault == "html":
            page = b"<html>Please log in</html>"
            self._head(200, {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(page))})
            self.wfile.write(page)
        elif data is None:
            self._head(404, {"Content-Length": "0"})
        else:
            self._send(data, fault, int(number or 0))

    def _send(self, data: bytes, fault: str, number: int) -> None:
        state = self.server_state
        headers, status, begin = {"Content-Type": "application/octet-stream"}, 200, 0
        if "no-etag" not in state.always:
            headers["ETag"] = version = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
        if "last-modified" in state.always:
            headers["Last-Modified"] = version = "Tue, 24 Nov 2026 10:00:00 GMT"
        asked = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and "ignore-range" not in state.always and self.headers.get("If-Range", version) == version:
            begin, status = int(asked[1]), 206
            if begin >= len(data):
                self._head(416, {"Content-Range": f"bytes */{len(data)}", "Content-Length": "0"})
                return
            shown = begin + 7 if fault == "wrong-range" else begin
            total = {"no-total": "*", "other-total": len(data) - 9}.get(fault, len(data))
            headers["Content-Range"] = f"bytes {shown}-{len(data) - 1}/{total}"
        self._send_body(data[begin:], fault, number, status, headers)

    def _send_body(self, body: bytes, fault: str, number: int, status: int, headers: dict[str, str]) -> None:
        state = self.server_state
        if fault == "corrupt":
            body = body[:100] + bytes([body[100] ^ 1]) + body[101:]
        if fault == "gzip":
            body = gzip.compress(body)
            headers["Content-Encoding"] = "gzip"
        if fault == "chunked":
            headers["Transfer-Encoding"] = "chunked"
        elif fault != "no-length":
            headers["Content-Length"] = str(len(body))
        self._head(status, headers)
        if fault == "chunked":
            for start in range(0, number or len(body), BLOCK):
                block = body[start : min(start + BLOCK, number or len(body))]
                self.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
            if not number:
                self.wfile.write(b"0\r\n\r\n")
            return
        sent = number if fault in {"cut", "reset", "hold"} else 0 if fault == "stall" else len(body)
        self.wfile.write(body[:sent])
        if fault in {"hold", "stall"}:
            self.wfile.flush()
            state.holding.set()
            state.go.wait(60)
            self._write_on(body[sent:])
        elif fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _write_on(self, rest: bytes) -> None:
        try:
            self.wfile.write(rest)
        except OSError:  # who asked has gone meanwhile
            self.wfile = Path("/dev/null").open("wb")  # noqa: SIM115 - for the handler to flush and close

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Connection", "close")
        self.end_headers()
