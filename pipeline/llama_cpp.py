"""llama.cpp's programs, as scripts/build_llama_cpp.sh leaves them: found, and asked for logits, ids, text, speed.

Logits and token ids come from our own program, llama-probe; scripts/llama_cpp/llama_probe.cpp says what goes over
its pipes. It answers each record before it reads the next, so writing one and reading one cannot deadlock, and
memory holds one answer at a time.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, NoReturn

import numpy as np

from pipeline import child
from pipeline.errors import CheckFailed, ConfigError

PROGRAMS = ("llama-quantize", "llama-completion", "llama-bench", "llama-probe")
CONVERTER = Path("convert", "convert_hf_to_gguf.py")
STOP_MARK = " [end of text]\n"  # llama-completion's, when the model ended its text before the limit
BENCH = ("-p", "64", "-n", "32", "-r", "3")  # tokens of prompt, tokens to generate, repetitions
WORD = np.dtype("<i4")


@dataclass(frozen=True)
class LlamaCpp:
    """`root` has bin/, convert/ (the checkpoint converter), models/ggml-vocab-gpt-2.gguf and BUILD.json."""

    root: Path
    version: str
    identity: str  # source, compiler and flags: what decides the output, wherever the folder lies

    def program(self, name: str) -> Path:
        return self.root / "bin" / name


@dataclass(frozen=True)
class Generation:
    text: str  # without the prompt
    stopped: bool  # by the model's own end token, before the limit


@dataclass(frozen=True)
class Speed:
    prompt_tokens_per_second: float
    generation_tokens_per_second: float
    peak_bytes: int


def find(folder: str = "") -> LlamaCpp:
    """The build in `folder`, else the newest in the cache. Raises `ConfigError` when it is absent or not whole."""
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = (Path(folder) if folder else cache_home / "quotesmith" / "llama.cpp" / "current").resolve()
    needed = [Path("BUILD.json"), CONVERTER, *(Path("bin", program) for program in PROGRAMS)]
    missing = [str(path) for path in needed if not (root / path).is_file()]
    if missing:
        raise ConfigError(
            f"the llama.cpp tools are not in {root}: {missing[0]} is missing; run scripts/build_llama_cpp.sh, or set "
            "llama_cpp to a folder that it made"
        )
    text = (root / "BUILD.json").read_text()
    build = json.loads(text)
    return LlamaCpp(root, f"{build['llama_cpp']} ({build['package']} {build['version']})", text)


def threads() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def logits(tools: LlamaCpp, gguf: Path, sequences: Iterable[Sequence[int]]) -> Iterator[np.ndarray]:
    """(T, V) float32 for each sequence, one at a time; row t predicts token t + 1.

    Raises `CheckFailed` for a sequence longer than the model's context, or an id outside its vocabulary.
    """
    with probe(tools, "logits", gguf, str(threads())) as pipe:
        n_vocab = int(pipe.words(2)[0])
        for ids in sequences:
            pipe.send(len(ids), np.asarray(ids, dtype=WORD).tobytes())
            yield np.frombuffer(pipe.read(4 * len(ids) * n_vocab), dtype="<f4").reshape(len(ids), n_vocab)


def tokenize(tools: LlamaCpp, gguf: Path, texts: Iterable[str]) -> Iterator[list[int]]:
    """The ids of each text: no special token added, none recognized in the text."""
    with probe(tools, "tokenize", gguf) as pipe:
        for text in texts:
            data = text.encode()
            pipe.send(len(data), data)
            yield [int(word) for word in pipe.words(int(pipe.words(1)[0]))]


class Pipe:
    """Both ends of a running llama-probe. If it ends too soon, its own message becomes the error."""

    def __init__(self, process: child.Process, stderr: IO[bytes]) -> None:
        self.process, self.stderr = process, stderr

    def send(self, count: int, items: bytes) -> None:
        try:
            self.process.stdin.write(count.to_bytes(4, "little") + items)  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            self.fail()

    def read(self, size: int) -> bytearray:
        data = bytearray(size)  # writable, so that torch takes it without a copy
        if self.process.stdout.readinto(data) != size:  # type: ignore[union-attr]
            self.fail()
        return data

    def words(self, count: int) -> np.ndarray:
        return np.frombuffer(self.read(4 * count), dtype=WORD)

    def fail(self) -> NoReturn:
        self.process.wait()
        child.require_success(self.process, self.stderr)
        raise CheckFailed("llama-probe ended before it had answered")


@contextmanager
def probe(tools: LlamaCpp, *arguments: str | Path) -> Iterator[Pipe]:
    command = [tools.program("llama-probe"), *arguments]
    with child.started(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as (process, stderr):
        yield Pipe(process, stderr)


def generate(
    tools: LlamaCpp,
    gguf: Path,
    prompt: str,
    *,
    seed: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    repeat_penalty: float,
) -> Generation:
    """What the model writes after `prompt`; after an empty one, from its begin token."""
    with tempfile.NamedTemporaryFile("wb") as file:
        file.write(prompt.encode())
        file.flush()
        finished = child.run([
            tools.program("llama-completion"), "--model", gguf,
            *(("--file", file.name, "--no-escape") if prompt else ()),  # bytes: no quoting, no backslash escapes
            "--ctx-size", str(context_for(gguf, len(prompt.encode()) + max_new_tokens)),
            "--predict", str(max_new_tokens), "--seed", str(seed), "--temp", str(temperature),
            "--top-p", str(top_p), "--repeat-penalty", str(repeat_penalty),
            "--top-k", "0", "--min-p", "0",  # off: nothing filters but what the settings name
            "--threads", str(threads()),
            "--no-conversation", "--no-display-prompt", "--simple-io", "--no-warmup", "--no-perf",
        ])  # fmt: skip
    return read_completion(finished.stdout)


def read_completion(stdout: str) -> Generation:
    """llama-completion ends its output with two line ends, after its mark if the model stopped by itself."""
    text = stdout.removesuffix("\n\n")
    return Generation(text.removesuffix(STOP_MARK), text.endswith(STOP_MARK))


def context_for(gguf: Path, tokens: int) -> int:
    """With a little slack, but never more than the model's own: past its learned positions GPT-2 aborts."""
    return min(context_length(gguf, gguf.stat().st_mtime_ns), tokens + 16)


@cache
def context_length(gguf: Path, modified: int) -> int:
    from pipeline.gguf_file import GgufContents

    return int(GgufContents(gguf).metadata["context_length"])


def bench(tools: LlamaCpp, gguf: Path) -> Speed:
    """Tokens per second of `gguf` on this machine's CPU, mean of three, and llama-bench's peak memory."""
    command: list[str | Path] = [tools.program("llama-bench"), "--model", gguf, "--output", "json", "--threads", str(threads())]
    finished = child.run([*command, *BENCH])
    tests = json.loads(finished.stdout)
    prompt = next(float(test["avg_ts"]) for test in tests if test["n_prompt"])
    generation = next(float(test["avg_ts"]) for test in tests if test["n_gen"])
    return Speed(prompt, generation, finished.peak_bytes)
