"""A TCP proxy before a real server that delays, cuts, resets, swallows or drips what passes through it."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

CHUNK_BYTES = 65536
METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ", b"PATCH ")


@dataclass
class Fault:
    kind: str  # latency, cut, reset, black hole, drip
    direction: str = "down"  # from the server; "up": to it
    after: int = 0  # bytes of a connection that pass first
    times: int = 1_000_000  # it still spoils
    seconds: float = 0.02  # of latency, or between two dripped bytes


class Connection:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client, self.server = client, server
        self.over = threading.Event()
        self.fault: Fault | None = None
        self.passed = 0

    def end(self, *, reset: bool = False) -> None:
        self.over.set()
        for side in (self.client, self.server):
            with contextlib.suppress(OSError):
                if reset:  # no FIN: the other side learns of it by a RST
                    side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                else:
                    side.shutdown(socket.SHUT_RDWR)
                side.close()


class FaultProxy:
    """`url` is where clients go; `fault` can be changed at any time, and counts from then on.

    `requests` counts the requests that reached the proxy.
    """

    def __init__(self, target: str) -> None:
        parts = urlsplit(target)
        self.target = (str(parts.hostname), int(parts.port or 80))
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.fault: Fault | None = None
        self.requests = 0
        self.spoilt = 0
        self.lock = threading.Lock()
        self.connections: list[Connection] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # ends the thread that waits in accept, as close alone does not
        self.listener.close()
        for connection in self.connections:
            connection.end()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                try:
                    server = socket.create_connection(self.target)
                except OSError:
                    client.close()
                    continue
                connection = Connection(client, server)
                self.connections.append(connection)
                for direction in ("up", "down"):
                    threading.Thread(target=self._pump, args=(connection, direction), daemon=True).start()

    def _pump(self, connection: Connection, direction: str) -> None:
        up = direction == "up"
        source, sink = (connection.client, connection.server) if up else (connection.server, connection.client)
        try:
            while data := source.recv(CHUNK_BYTES):
                if up:
                    self.requests += data.startswith(METHODS)
                elif data.startswith(b"HTTP/1"):
                    # A server that names its own address would lead the client around the proxy.
                    data = data.replace(b":%d/" % self.target[1], b":%d/" % self.port)
                self._pass_on(connection, direction, data, sink)
        except OSError:
            pass
        connection.end()

    def _pass_on(self, connection: Connection, direction: str, data: bytes, sink: socket.socket) -> None:
        fault = self.fault
        if fault is None or fault.direction != direction or fault.kind == "latency":
            time.sleep(fault.seconds if fault and fault.kind == "latency" else 0)
            sink.sendall(data)
            return
        if connection.fault is not fault:
            connection.fault, connection.passed = fault, 0
        let_through = max(0, fault.after - connection.passed)
        connection.passed += len(data)
        if len(data) <= let_through or not self._spoils(fault):
            sink.sendall(data)
            return
        sink.sendall(data[:let_through])
        if fault.kind == "drip":
            for byte in data[let_through:]:
                sink.sendall(bytes([byte]))
                time.sleep(fault.seconds)
        elif fault.kind == "black hole":
            connection.over.wait()
        else:
            connection.end(reset=fault.kind == "reset")

    def _spoils(self, fault: Fault) -> bool:
        with self.lock:
            if fault.times <= 0:
                return False
            fault.times -= 1
            self.spoilt += 1
            return True


@contextlib.contextmanager
def before(target: str) -> Iterator[FaultProxy]:
    proxy = FaultProxy(target)
    try:
        yield proxy
    finally:
        proxy.close()
