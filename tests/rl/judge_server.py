"""A real HTTP server on the loopback interface that plays an OpenAI-compatible endpoint, and behaves badly on request.

It writes bytes to sockets by hand: half a reply, a reset, a body without end and a drip can't be had from a library that
keeps the protocol. `respond(n, body)` says what the n-th request gets: a `Raw`, or one of the helpers below.
"""

from __future__ import annotations

import json
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Raw:
    """What goes over the wire, piece by piece with `pause` seconds before each; `reset` ends with a TCP reset."""

    pieces: list[bytes] = field(default_factory=list)
    pause: float = 0.0
    reset: bool = False


def http(status: int, body: bytes | str = b"", headers: dict[str, str] | None = None) -> Raw:
    body = body.encode() if isinstance(body, str) else body
    head = {"Content-Length": str(len(body)), "Content-Type": "application/json", **(headers or {})}
    lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
    return Raw([f"HTTP/1.1 {status} Status\r\n{lines}\r\n".encode() + body])


def chat(content: Any, **more: Any) -> Raw:
    """A chat completion with these words; `message` adds to the message, the rest to the reply."""
    message = {"role": "assistant", "content": content, **more.pop("message", {})}
    return http(200, json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], **more}))


def after(seconds: float, answer: Raw) -> Raw:
    time.sleep(seconds)
    return answer


class Server:
    """Listens until `close`. Keeps every request's body, headers and path, and counts what runs at once."""

    chat, http, after, Raw = staticmethod(chat), staticmethod(http), staticmethod(after), Raw

    def __init__(self) -> None:
        self.respond: Callable[[int, dict[str, Any]], Raw] = lambda _n, _body: chat("Same. [[YES]]")
        self.bodies, self.headers, self.paths = list[dict[str, Any]](), list[dict[str, str]](), list[str]()
        self.times = list[float]()
        self.running = self.most = 0
        self.lock = threading.Lock()
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                while outer.exchange(self.connection, self.rfile):
                    pass

        class Quiet(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 128

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that gave up waiting

        self.tcp = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.tcp.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.tcp.server_address[1]}/v1"

    def user(self, number: int) -> str:
        """The user's turn of a request."""
        return self.bodies[number]["messages"][1]["content"]

    def close(self) -> None:
        self.tcp.shutdown()
        self.tcp.server_close()

    def exchange(self, connection: socket.socket, file: Any) -> bool:
        """One request and its answer; False: the connection is over."""
        start = file.readline()
        if not start:
            return False
        headers: dict[str, str] = {}
        while (line := file.readline().decode().strip()) != "":
            name, _, value = line.partition(":")
            headers[name.title()] = value.strip()
        body = json.loads(file.read(int(headers.get("Content-Length", 0))) or b"{}")  # a GET has none
        with self.lock:
            number = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(headers)
            self.paths.append(start.decode().split()[1])
            self.times.append(time.monotonic())
            self.running += 1
            self.most = max(self.most, self.running)
        try:
            answer = self.respond(number, body)
        finally:
            with self.lock:
                self.running -= 1
        for piece in answer.pieces:
            time.sleep(answer.pause)
            connection.sendall(piece)
        if answer.reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
            return False
        whole = len(answer.pieces) == 1 and b"Content-Length" in answer.pieces[0] and not answer.pause
        if not whole:
            connection.shutdown(socket.SHUT_RDWR)
        return whole
