"""What this is made of, by the packages' metadata: importing them would take seconds."""

from __future__ import annotations

import importlib.metadata
import os
import platform

from pipeline import __version__

PACKAGES = (
    *("accelerate", "bitsandbytes", "datasets", "gguf", "google-cloud-storage", "numpy", "peft", "safetensors"),
    *("tokenizers", "torch", "transformers"),
)
REVISION = "IMAGE_REVISION"  # set in an image: the commit that it was built from, or "unknown"


def versions(llama_cpp: str) -> dict[str, str]:
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"quotesmith": __version__, "python": platform.python_version(), "llama.cpp": llama_cpp, **found}


def revision() -> str:
    return os.environ.get(REVISION, "unknown")
