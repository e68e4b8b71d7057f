"""What the model hub answers to whoever downloads a snapshot, for one model in a folder under any name."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The server's address."""

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path, _, _ = self.path.partition("?")
            parts = path.strip("/").split("/")
            if parts[:2] == ["api", "models"]:
                files = [
                    {"type": "file", "path": each.name, "size": each.stat().st_size, "oid": "0" * 40}
                    for each in folder.iterdir()
                ]
                body = json.dumps(
                    files if parts[4] == "tree" else {"id": "/".join(parts[2:4]), "sha": parts[5]}
                ).encode()
            elif parts[2:3] == ["resolve"]:
                body = (folder / parts[4]).read_bytes()
            else:
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            if parts[0] != "api":
                self.send_header("X-Repo-Commit", parts[3])
                self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
