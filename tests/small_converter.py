"""llama.cpp's converter for GPT-2 alone and without torch, whose import takes seconds: for a vocabulary of 258 tokens,
which the real one refuses. `tests/small_gpt2.py` lays it out as a build of llama.cpp."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import load_file

NAMES = {
    "wte": "token_embd",
    "wpe": "position_embd",
    "ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    for option in ("--outtype", "--outfile", "--model-name"):
        parser.add_argument(option, required=True)
    given = parser.parse_args()
    writer = gguf.GGUFWriter(given.outfile, "gpt2")
    writer.add_name(given.model_name)
    add_metadata(writer, json.loads((given.folder / "config.json").read_text()))
    add_tokens(writer, json.loads((given.folder / "tokenizer.json").read_text()))
    for name, array in load_file(given.folder / "model.safetensors").items():
        writer.add_tensor(*stored(name, array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_metadata(writer: gguf.GGUFWriter, config: dict[str, int]) -> None:
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_ctx"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])


def add_tokens(writer: gguf.GGUFWriter, tokenizer: dict) -> None:
    by_id = {number: token for token, number in tokenizer["model"]["vocab"].items()}
    special = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    count = len(by_id | special)
    kinds = (gguf.TokenType.CONTROL if number in special else gguf.TokenType.NORMAL for number in range(count))
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([(by_id | special)[number] for number in range(count)])
    writer.add_token_types(list(kinds))
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(max(special))
    writer.add_eos_token_id(max(special))
    writer.add_add_bos_token(True)


def stored(name: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """As llama.cpp names and stores it: matrices (out, in) in F16, the rest in F32."""
    module, _, kind = name.removeprefix("transformer.").rpartition(".")
    block, rest = module.split(".", 2)[1:] if module.startswith("h.") else ("", module)
    target = f"blk.{block}.{NAMES[rest]}.{kind}" if block else f"{NAMES[rest]}.{kind}"
    if array.ndim == 1 or rest == "wpe":
        return target, array.astype(np.float32)
    return target, np.ascontiguousarray(array if rest == "wte" else array.T).astype(np.float16)


if __name__ == "__main__":
    main()
