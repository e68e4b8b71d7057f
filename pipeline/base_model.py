"""The base model, from a hub, a folder or a GGUF file, brought into the one form every later stage loads:
fp32 safetensors, config and a fast tokenizer."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

import httpx2
import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipeline.artifacts import Checkpoint, Facts, sha256_of_files
from pipeline.config import BASE_MODEL, BASE_REVISION, ModelConfig
from pipeline.errors import ConfigError, DataError, InputMissing, NotAllowed, ServiceUnavailable
from pipeline.gguf_model import model_from_gguf
from pipeline.model_folder import check_folder
from pipeline.storage.local import local_path

log = logging.getLogger(__name__)

EXPORTED = ("gpt2", "llama")  # the model types whose GGUF `gguf_proof.py` can prove

WEIGHTS = "model*.safetensors"  # never .bin: unpickling runs code
FILES = (
    WEIGHTS,
    "model.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
)
HUB_TIMEOUT_SECONDS = 10  # for the first answer; the library alone retries a dead hub for minutes
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
OFFLINE = (
    "to work without a hub, set model.base to a local folder with config.json and safetensors or to a Llama-type "
    ".gguf file, or use BASE_MODEL=offline scripts/run_local.sh"
)


def obtain(cfg: ModelConfig, *, out: Path) -> Checkpoint:
    """The base model in `out`, checked to be a causal language model with an end token.

    Raises `InputMissing` (no such path or commit), `ConfigError` (not a causal language model, no safetensors),
    `DataError` (torn weights), `NotAllowed` (gated, or no repository that can be seen), `ServiceUnavailable` (no hub).
    """
    path = on_disk(cfg) or download(cfg.base, commit_of(cfg))
    model, tokenizer = model_from_gguf(path) if path.is_file() else load(path, cfg.base)
    require_usable(model, tokenizer, cfg.base)
    model.save_pretrained(out)
    save_tokenizer(tokenizer, out)
    return Checkpoint.of(out, {"base": cfg.base, "identity": resolve(cfg)} | describe(model))


def resolve(cfg: ModelConfig) -> str:
    """What the base model is, without a network and without loading it: id@commit on a hub, else the hash of its
    files. Raises `InputMissing` for a path that is not there, `ConfigError` for a hub id without a commit."""
    path = on_disk(cfg)
    if path is None:
        return f"{cfg.base}@{commit_of(cfg)}"
    if path.is_dir():
        require_regular_files(path, cfg.base)
    files = [path] if path.is_file() else [file for pattern in FILES for file in path.glob(pattern)]
    return f"sha256:{sha256_of_files(files)}"


def require_regular_files(folder: Path, base: str) -> None:
    """Reading a pipe or a device could wait, or go on, for ever."""
    for file in folder.iterdir():
        if any(fnmatch(file.name, pattern) for pattern in FILES) and not file.is_file():
            raise DataError(f"{file.name} of model.base {base} is no regular file; fetch it again")


def on_disk(cfg: ModelConfig) -> Path | None:
    """The folder or .gguf file that `cfg.base` names; None when it is a hub id."""
    path = local_path(cfg.base)
    if not path.exists():
        if path.suffix == ".gguf" or not HUB_ID.fullmatch(cfg.base):
            raise InputMissing(f"model.base {cfg.base} does not exist")
        return None
    if cfg.revision:
        raise ConfigError(f"model.revision is for hub ids, but model.base {cfg.base} is on disk; leave it out")
    if not path.is_dir() and path.suffix != ".gguf":
        raise ConfigError(
            f"model.base {cfg.base} is neither a folder nor a .gguf file; give one with config.json and safetensors"
        )
    return path


def commit_of(cfg: ModelConfig) -> str:
    if not cfg.revision and cfg.base == BASE_MODEL:
        return BASE_REVISION
    if not COMMIT.fullmatch(cfg.revision):
        found = f"model.revision {cfg.revision!r} is not a commit" if cfg.revision else "model.revision is not set"
        raise ConfigError(
            f"model.base {cfg.base} is not on disk, so it is taken as a hub id, and {found}; give the 40 hex digits "
            "of a commit, because branches move"
        )
    return cfg.revision


def download(repo: str, commit: str) -> Path:
    """The snapshot in the hub's cache; without a network if it is there whole."""
    try:
        return Path(snapshot_download(repo, revision=commit, allow_patterns=FILES, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    with hub_errors(repo, commit):
        # One bounded question first. It also tells what is there before 500 MB are fetched in vain.
        info = HfApi().model_info(repo, revision=commit, timeout=HUB_TIMEOUT_SECONDS)
        require_files((file.rfilename for file in info.siblings or ()), repo)
        log.info("base_model: downloading %s at %s", repo, commit[:12])
        return Path(snapshot_download(repo, revision=commit, allow_patterns=FILES))


@contextmanager
def hub_errors(repo: str, commit: str) -> Iterator[None]:
    """The hub's errors in our words. A subclass stands before its base."""
    try:
        yield
    except GatedRepoError as e:
        raise NotAllowed(
            f"model.base {repo} is gated; accept its terms on the hub and set HF_TOKEN, or choose another model"
        ) from e
    except RepositoryNotFoundError as e:
        # not InputMissing: that is kept for good, and would refuse who sets a token
        raise NotAllowed(f"model.base {repo} is neither on disk nor on the hub (or it is private: set HF_TOKEN)") from e
    except RevisionNotFoundError as e:
        raise InputMissing(f"the hub has {repo}, but not its commit {commit}; correct model.revision") from e
    except HFValidationError as e:
        raise ConfigError(f"model.base {repo} is not a hub id: {e}") from e
    except HfHubHTTPError as e:
        status = e.response.status_code
        if status in (401, 403):
            raise NotAllowed(f"the hub answered {status} for {repo}; set HF_TOKEN to a token that may read it") from e
        raise ServiceUnavailable(f"the hub answered {status} for {repo}; try again later, or {OFFLINE}") from e
    except (httpx2.HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, TimeoutError) as e:
        raise ServiceUnavailable(f"the hub cannot be reached for {repo} ({type(e).__name__}); {OFFLINE}") from e


def load(folder: Path, base: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in fp32 and tokenizer, after the checks that cost nothing."""
    require_files((file.name for file in folder.iterdir()), base)
    require_regular_files(folder, base)
    require_causal_lm(folder / "config.json", base)
    try:
        check_folder(folder)
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as e:  # whatever transformers trips over, these files are not ours
        raise DataError(f"model.base {base} cannot be loaded ({first_line(e)}); fetch its files again") from e
    if report["missing_keys"]:  # transformers fills them with random numbers
        missing = sorted(report["missing_keys"])
        raise DataError(f"model.base {base} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model, tokenizer


def require_files(names: Iterable[str], base: str) -> None:
    found = sorted(names)
    if "config.json" not in found:
        raise ConfigError(f"model.base {base} has no config.json; found: {', '.join(found[:10]) or 'nothing'}")
    if not any(name.startswith("model") and name.endswith(".safetensors") for name in found):
        weights = [name for name in found if name.endswith((".bin", ".pt", ".pth", ".h5", ".gguf"))]
        raise ConfigError(
            f"model.base {base} ships no safetensors; found {', '.join(weights) or 'no weights at all'}; convert it "
            "first with save_pretrained (pickled files are never loaded: they can run code)"
        )
    if "tokenizer.json" not in found and not {"vocab.json", "merges.txt"} <= set(found):
        raise ConfigError(
            f"model.base {base} has no fast tokenizer; needed tokenizer.json or vocab.json and merges.txt"
        )


def require_causal_lm(config_json: Path, base: str) -> None:
    try:
        config = json.loads(config_json.read_text(encoding="utf-8"))
        kind, architectures = str(config.get("model_type", "nothing")), config.get("architectures") or []
    except (ValueError, AttributeError, RecursionError) as e:
        raise DataError(f"config.json of model.base {base} is not a JSON object ({e})") from e
    if config.get("quantization_config") is not None:
        raise ConfigError(f"model.base {base} is quantized by its config.json; give the model as it was before that")
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise DataError(f"config.json of model.base {base} has architectures {architectures!r}; needed a list of names")
    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, ())
    needed = (known,) if isinstance(known, str) else tuple(known)
    if not needed or (architectures and not set(needed) & set(architectures)):
        raise ConfigError(
            f"model.base {base} is not a causal language model: its config.json says {kind}, "
            f"{', '.join(architectures) or 'no architecture'}; needed one that predicts the next token, such as "
            f"{' or '.join(needed) or 'GPT2LMHeadModel or LlamaForCausalLM'}"
        )
    if kind not in EXPORTED:
        raise ConfigError(
            f"model.base {base} is of the type {kind}, whose GGUF this job cannot prove; choose a model of the type "
            f"{' or '.join(EXPORTED)}"
        )


def require_usable(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base: str) -> None:
    if not tokenizer.is_fast:
        raise ConfigError(f"the tokenizer of model.base {base} is not a fast one; convert it to tokenizer.json")
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"the tokenizer of model.base {base} has no end token, so the model could not learn to stop")
    rows, highest = model.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise DataError(
            f"the tokenizer of model.base {base} has ids up to {highest}, but the model only {rows} embeddings; "
            "they do not belong together"
        )
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            raise DataError(f"model.base {base} has values in {name} that are not finite; fetch its files again")


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """The tokenizer as files, with the promise that a text starts at the begin token.

    llama.cpp's converter takes `add_bos_token` from tokenizer_config.json into the GGUF; save_pretrained drops it.
    Encoding must still add nothing: the converter knows the pre-tokenizer by the hash of an encoded text.
    """
    if tokenizer.bos_token is None:
        tokenizer.bos_token = tokenizer.eos_token
    tokenizer.chat_template = None  # the result speaks freely; it does not chat
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"add_bos_token": True}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def describe(model: PreTrainedModel) -> Facts:
    config = model.config
    return {
        "architecture": type(model).__name__,
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": config.vocab_size,
        "positions": config.max_position_embeddings,
        "tied_embeddings": bool(config.tie_word_embeddings),
    }


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
