"""llama.cpp's programs, as scripts/build_llama_cpp.sh leaves them: found, and asked for logits, ids, text, speed.

Logits, token ids and texts come from our own program, llama-probe; scripts/llama_cpp/llama_probe.cpp says what goes
over its pipes. It answers each record before it reads the next, so writing one and reading one cannot deadlock, and
memory holds one answer at a time.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import numpy as np

from pipeline import child, threads
from pipeline.disk import as_machine_error
from pipeline.errors import CheckFailed, ConfigError, MachineError

PROGRAMS = ("llama-quantize", "llama-bench", "llama-probe")
CONVERTER = Path("convert", "convert_hf_to_gguf.py")
BENCH = ("-p", "64", "-n", "32", "-r", "3", "--output", "json")  # tokens of prompt, to generate, repetitions
WORD = np.dtype("<i4")
START_SECONDS = 60  # from a cold disk that others use too
REBUILD = "run scripts/build_llama_cpp.sh on a machine of this kind, or take the image that fits it"


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
    # Path.home raises for a user that has none, as containers run with
    cache_home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))  # noqa: PTH111
    root = (Path(folder) if folder else cache_home / "quotesmith" / "llama.cpp" / "current").resolve()
    needed = [Path("BUILD.json"), CONVERTER, *(Path("bin", program) for program in PROGRAMS)]
    missing = [str(path) for path in needed if not (root / path).is_file()]
    if missing:
        raise ConfigError(
            f"the llama.cpp tools are not in {root}: {missing[0]} is missing; run scripts/build_llama_cpp.sh, or set "
            "llama_cpp to a folder that it made"
        )
    text = (root / "BUILD.json").read_text()
    try:
        build = json.loads(text)
        version = f"{build['llama_cpp']} ({build['package']} {build['version']})"
    except (ValueError, KeyError, TypeError) as e:
        raise ConfigError(f"{root / 'BUILD.json'} is damaged; delete {root} and run scripts/build_llama_cpp.sh") from e
    return LlamaCpp(root, version, text)


def require_programs_start(tools: LlamaCpp) -> None:
    """Raises `ConfigError` for a program that this machine cannot run, or that lacks a library; `MachineError` for one
    that gets no time or memory."""
    for name in PROGRAMS:
        try:
            with child.started([tools.program(name), "--help"], stdout=subprocess.DEVNULL) as (process, stderr):
                code = process.wait(START_SECONDS)
                said = child.last_line(stderr)
        except OSError as e:
            if error := as_machine_error(e, tools.program(name)):
                raise error from e
            raise ConfigError(f"{tools.program(name)} does not start ({e.strerror}); {REBUILD}") from e
        except subprocess.TimeoutExpired as e:
            raise MachineError(
                f"{tools.program(name)} does not answer within {START_SECONDS} s; run again when the machine is less "
                f"busy, or {REBUILD}"
            ) from e
        if code == -signal.SIGILL:
            raise ConfigError(
                f"this CPU lacks instructions (AVX2) that {tools.program(name)} needs; take a newer machine"
            )
        if code not in (0, 1):  # 1: most tools that only showed their help
            raise ConfigError(f"{tools.program(name)} does not start ({said}); {REBUILD}")


def logits(tools: LlamaCpp, gguf: Path, sequences: Iterable[Sequence[int]]) -> Iterator[np.ndarray]:
    """(T, V) float32 for each sequence, one at a time; row t predicts token t + 1.

    Raises `CheckFailed` for a sequence longer than the model's context, or an id outside its vocabulary.
    """
    with probe(tools, "logits", gguf, str(threads.count())) as pipe:
        n_vocab = int(pipe.words(2)[0])
        for ids in sequences:
            pipe.send(len(ids).to_bytes(4, "little") + np.asarray(ids, dtype=WORD).tobytes())
            yield np.frombuffer(pipe.read(4 * len(ids) * n_vocab), dtype="<f4").reshape(len(ids), n_vocab)


def tokenize(tools: LlamaCpp, gguf: Path, texts: Iterable[str]) -> Iterator[list[int]]:
    """The ids of each text: no special token added, none recognized in the text."""
    with probe(tools, "tokenize", gguf) as pipe:
        for text in texts:
            pipe.send(record(text.encode()))
            yield [int(word) for word in pipe.words(int(pipe.words(1)[0]))]


class Pipe:
    """Both ends of a running llama-probe. If it ends too soon, its own message becomes the error."""

    def __init__(self, process: child.Process, stderr: IO[bytes]) -> None:
        self.process, self.stderr = process, stderr

    def send(self, data: bytes) -> None:
        try:
            self.process.stdin.write(data)  # type: ignore[union-attr]
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


def record(text: bytes) -> bytes:
    return len(text).to_bytes(4, "little") + text


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
    """What the model writes after `prompt`; after an empty one, from its begin token.

    Sampled by llama.cpp in its own order: repeat penalty over the last 64 tokens, top-p, temperature; 0 is greedy.
    Ends at the model's own context at the latest. Raises `CheckFailed` for a prompt that fills it.
    """
    with probe(tools, "generate", gguf, str(threads.count())) as pipe:
        seed %= 2**32 - 1  # the largest would ask llama.cpp for a random seed
        pipe.send(struct.pack("<IIfff", seed, max_new_tokens, temperature, top_p, repeat_penalty))
        pipe.send(record(prompt.encode()))
        stopped, size = pipe.words(2)
        return Generation(pipe.read(int(size)).decode(errors="replace"), bool(stopped))


def quantize(tools: LlamaCpp, f16: Path, path: Path, kind: str, options: Sequence[str | Path] = ()) -> None:
    """Writes `path`; files that `options` name are looked for in its folder."""
    command = [tools.program("llama-quantize"), *options, f16.resolve(), path.name, kind, str(threads.count())]
    child.run(command, writes_in=path.parent, cwd=path.parent)


def bench(tools: LlamaCpp, gguf: Path) -> Speed:
    """Tokens per second of `gguf` on this machine's CPU, mean of three, and llama-bench's peak memory."""
    finished = child.run([tools.program("llama-bench"), "--model", gguf, "--threads", str(threads.count()), *BENCH])
    tests = json.loads(finished.stdout)
    prompt = next(float(test["avg_ts"]) for test in tests if test["n_prompt"])
    generation = next(float(test["avg_ts"]) for test in tests if test["n_gen"])
    return Speed(prompt, generation, finished.peak_bytes)
