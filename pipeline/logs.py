"""Logging for people on a terminal and for log collectors elsewhere: one JSON object a line. No secret gets out."""

from __future__ import annotations

import json
import logging
import sys
import threading
import time

from pipeline.redact import redact

QUIET = (
    "transformers",
    "bitsandbytes",
    "datasets",
    "gguf",
    "httpx",
    "huggingface_hub",
    "urllib3",
    "peft",
    "accelerate",
)


class JsonLines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "severity": record.levelname,
            "logger": record.name,
            "message": redact(record.getMessage()),
        }
        if record.exc_info:
            line["traceback"] = redact(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False)


class Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


def on_thread_error(failed: threading.ExceptHookArgs) -> None:
    """A library's thread has no caller to tell: one line, redacted as all others are, and a traceback for bugs only."""
    if failed.exc_type is SystemExit:
        return
    name = failed.thread.name if failed.thread else "thread"
    error = failed.exc_value
    bug = error if not isinstance(error, OSError) else None
    logging.getLogger(__name__).warning("%s ended with %s: %s", name, failed.exc_type.__name__, error, exc_info=bug)


def on_terminal() -> bool:
    return sys.stderr.isatty()


def as_json() -> bool:
    """Whether the log is JSON lines; False before it is configured."""
    return any(isinstance(handler.formatter, JsonLines) for handler in logging.getLogger().handlers)


def configure(log_format: str) -> None:
    """`log_format` is text, json or auto (text on a terminal). Called once, by the door."""
    json_lines = log_format == "json" or (log_format == "auto" and not on_terminal())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if json_lines else Lines("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)
    threading.excepthook = on_thread_error
    for name in (*QUIET, "py.warnings"):
        logging.getLogger(name).setLevel(logging.ERROR)
