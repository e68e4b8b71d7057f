import re
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from click import ClickException

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))

import image_sizes
from image_sizes import Wheel, held, pins, unpack_hollow, wheels

FILES = {"torch/version.py": b"cuda: str = '13.0'\n", "torch/lib/a.so": bytes(3_000_000), "torch/b.py": b"x" * 100}


class Ranges(BaseHTTPRequestHandler):
    """Parts of one file, of which it counts the bytes; the whole of it under /whole, as some servers do."""

    content = b""
    sent = 0

    def do_GET(self):
        start, end = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        part = self.content if self.path == "/whole" else self.content[start : end + 1]
        self.send_response(200 if self.path == "/whole" else 206)
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        Ranges.sent += len(part)

    def log_message(self, *args):
        pass


@pytest.fixture
def index(tmp_path):
    with zipfile.ZipFile(tmp_path / "torch.whl", "w") as archive:  # stored, so that it is longer than its list of files
        for name, content in FILES.items():
            archive.writestr(name, content)
    Ranges.content, Ranges.sent = (tmp_path / "torch.whl").read_bytes(), 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Ranges)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_wheel_is_unpacked_hollow_from_its_list_of_files(index, tmp_path):
    packages = tmp_path / "packages"
    unpack_hollow(Wheel("torch", f"{index}/torch.whl", len(Ranges.content)), packages)
    assert {str(path.relative_to(packages)): path.stat().st_size for path in packages.rglob("*") if path.is_file()} == {
        name: len(content) for name, content in FILES.items()
    }
    assert (packages / "torch/version.py").read_bytes() == FILES["torch/version.py"]
    assert held(packages) == sum(map(len, FILES.values()))
    assert Ranges.sent < len(Ranges.content) / 2


def test_a_server_that_sends_the_whole_file_is_refused(index, tmp_path):
    with pytest.raises(ClickException, match="cannot be read in parts"):
        unpack_hollow(Wheel("torch", f"{index}/whole", len(Ranges.content)), tmp_path)


def test_asked_for_are_the_packages_that_the_cpu_variant_has_not(monkeypatch):
    monkeypatch.setattr(image_sizes, "wheel", lambda name, version, hashes: name)
    cuda, cpu = pins("cuda"), pins("cpu")
    assert set(wheels()) == {*(set(cuda) - set(cpu)), "torch", "bitsandbytes"}
