import json
import os
import shutil
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from pipeline import gguf_proof
from pipeline.config import ExportConfig
from pipeline.errors import CheckFailed, ConfigError
from pipeline.export import POSITIONS, export
from pipeline.extend import with_context
from pipeline.gguf_f16 import store_as_f16
from pipeline.gguf_file import GgufContents
from pipeline.gguf_proof import measure as prove_measure
from pipeline.gguf_proof import prove_logits, prove_metadata, prove_tensors, prove_tokens, rounded_model
from pipeline.llama_cpp import logits
from pipeline.scoring import torch_logits
from tests.exported import corpus_in, inputs


@pytest.fixture(scope="module")
def toy(toy_gpt2, tmp_path_factory):
    return inputs(toy_gpt2, tmp_path_factory.mktemp("toy-inputs"))


@pytest.fixture(scope="module")
def exported(toy, llama_cpp, tmp_path_factory):
    out = tmp_path_factory.mktemp("export")
    return export(*toy, ExportConfig(), tools=llama_cpp, name="toy", out=out)


@pytest.fixture(scope="module")
def longer(toy, llama_cpp, tmp_path_factory):
    """The same model with 4,096 positions."""
    out = tmp_path_factory.mktemp("longer")
    return export(*toy, ExportConfig(context=4096), tools=llama_cpp, name="toy", out=out)


@pytest.fixture
def copy(exported, tmp_path):
    """The exported file, to be spoiled."""
    return Path(shutil.copy(exported.path, tmp_path / "copy.gguf"))


def test_gpt2_is_exported_and_every_proof_counts(exported, toy_gpt2):
    assert exported.path.name == "toy-F16.gguf"
    assert exported.facts["tensors"] == exported.facts["proof"]["tensors_equal"] == 4 + 12 * 2
    assert exported.facts["proof"]["quotes_tokenized"] == 45
    assert exported.facts["proof"]["logits"]["rms"] < 0.002
    assert exported.facts["tensor_types"] == {"F32": 19, "F16": 9}
    assert exported.facts["metadata"]["context_length"] == 1024
    assert exported.facts["metadata"]["tokenizer.ggml.pre"] == "gpt-2"
    assert exported.facts["metadata"]["tokenizer.ggml.add_bos_token"] is True
    assert [path.name for path in exported.path.parent.iterdir()] == ["toy-F16.gguf"]


def test_the_checkpoint_is_left_as_it_was(exported, toy_gpt2):
    assert "n_ctx" not in json.loads((toy_gpt2 / "config.json").read_text())
    assert not any(path.is_symlink() for path in toy_gpt2.iterdir())


def test_one_flipped_bit_of_one_weight_is_found_by_name(copy, toy_gpt2):
    tensor = next(t for t in GGUFReader(copy, "r+").tensors if t.name == "blk.1.ffn_down.weight")
    tensor.data.view(np.uint16)[3, 5] ^= 1
    tensor.data.flush()
    with pytest.raises(CheckFailed, match=r"blk\.1\.ffn_down\.weight differs from the checkpoint's in 1 of"):
        prove_tensors(GgufContents(copy), toy_gpt2)


@pytest.mark.parametrize("name", ["transformer.h.1.mlp.c_fc.bias", "transformer.wte.weight"])
def test_a_checkpoint_with_a_tensor_less_is_found(exported, toy_gpt2, tmp_path, name):
    smaller = spoiled(toy_gpt2, tmp_path, lambda weights: weights.pop(name))
    with pytest.raises(CheckFailed, match=r"which the checkpoint has not"):
        prove_tensors(GgufContents(exported.path), smaller)


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "is not finite in the checkpoint"), (1e6, "more than F16 can hold")]
)
def test_weights_that_f16_cannot_hold_are_refused_by_name(exported, toy_gpt2, tmp_path, value, message):
    def put(weights):
        weights["transformer.h.0.attn.c_attn.weight"][0, 0] = value

    with pytest.raises(CheckFailed, match=rf"blk\.0\.attn_qkv\.weight.*{message}"):
        prove_tensors(GgufContents(exported.path), spoiled(toy_gpt2, tmp_path, put))


def spoiled(checkpoint, folder, change):
    out = Path(shutil.copytree(checkpoint, folder / "spoiled"))
    weights = load_file(out / "model.safetensors")
    change(weights)
    save_file(weights, out / "model.safetensors")
    return out


@pytest.mark.parametrize(("key", "value"), [("gpt2.context_length", 4096), ("tokenizer.ggml.eos_token_id", 11)])
def test_a_wrong_number_in_the_header_is_found_by_its_key(copy, toy, key, value):
    field = GGUFReader(copy, "r+").fields[key]
    field.parts[field.data[0]][0] = value
    model, _, tokens = toy
    with pytest.raises(CheckFailed, match=rf"{key.removeprefix('gpt2.')} is {value}, the checkpoint's is"):
        prove_metadata(GgufContents(copy), model.path, tokens.begin_id, tokens.end_id)


def test_swapped_tokens_are_found_with_the_quote(copy, toy, llama_cpp, tmp_path):
    """Two tokens of equal length change places in the vocabulary: still a valid file."""
    field = GGUFReader(copy, "r+").fields["tokenizer.ggml.tokens"]
    words = {bytes(field.parts[i]): i for i in field.data}
    one, other = (field.parts[words[word.encode()]] for word in ("\u0120things", "\u0120people"))
    one[:], other[:] = other.copy(), one.copy()
    model, corpus, _ = toy
    with pytest.raises(CheckFailed, match="Quote number 0 is about 0 things"):
        prove_tokens(copy, corpus, model.path, llama_cpp)


def test_logits_of_another_model_are_found(copy, toy, llama_cpp):
    """The epsilon of the norms is in no tensor: only the logits can tell."""
    model, _, tokens = toy
    field = GGUFReader(copy, "r+").fields["gpt2.attention.layer_norm_epsilon"]
    field.parts[field.data[0]][0] = 0.1
    with pytest.raises(CheckFailed, match=r"log-probabilities differ .* allowed is export\.logits_tolerance 0\.01"):
        prove_logits(GgufContents(copy), model.path, tokens, 0.01, llama_cpp)


def test_logits_that_are_not_numbers_do_not_pass(exported, toy, llama_cpp, monkeypatch):
    monkeypatch.setattr(gguf_proof, "measure", lambda pairs: {"rms": float("nan")})
    with pytest.raises(CheckFailed, match="differ from torch's by nan"):
        prove_logits(GgufContents(exported.path), toy[0].path, toy[2], 0.01, llama_cpp)


def test_a_pre_tokenizer_that_llama_cpp_does_not_know_is_a_failed_check(toy, llama_cpp, tmp_path):
    """A changed vocabulary: the converter recognizes it by a hash of what it makes of a text."""
    model, corpus, tokens = toy
    changed = Path(shutil.copytree(model.path, tmp_path / "changed"))
    tokenizer = json.loads((changed / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (changed / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckFailed, match=r"convert_hf_to_gguf\.py failed.*last line: "):
        export(replace(model, path=changed), corpus, tokens, ExportConfig(), tools=llama_cpp, name="x", out=tmp_path)


def test_more_positions_are_exported_in_f16_and_proved(longer, toy_gpt2):
    assert longer.facts["metadata"]["context_length"] == 4096
    assert longer.facts["matrix_types"]["position_embd"] == {"F16": 1}
    assert longer.facts["tensor_types"] == {"F32": 18, "F16": 10}
    assert longer.facts["proof"]["tensors_equal"] == longer.facts["tensors"] == 28
    assert [path.name for path in longer.path.parent.iterdir()] == ["toy-F16.gguf"]
    stored = GgufContents(longer.path).tensors["position_embd.weight"].data
    trained = load_file(toy_gpt2 / "model.safetensors")["transformer.wpe.weight"]
    assert stored.shape == (4096, 256)
    assert np.array_equal(stored[:1024], trained.half().numpy())


def test_short_prompts_are_as_without_the_extension_but_for_the_rounding_of_the_table(longer, copy, llama_cpp):
    """To the last bit once the table of the other file is rounded to F16 too; and that rounding changes little."""
    prompts = [[50256, *range(n, n + 60)] for n in (100, 2000)] + [[50256, *range(1023)]]
    ours = np.concatenate(list(logits(llama_cpp, longer.path, prompts)))
    without = np.concatenate(list(logits(llama_cpp, copy, prompts)))
    store_as_f16(copy, POSITIONS)
    rounded = np.concatenate(list(logits(llama_cpp, copy, prompts)))
    assert np.array_equal(ours, rounded)
    rms = float(np.sqrt(np.square(ours - without).mean()) / without.std())
    assert 0 < rms < 1e-3


def test_past_the_last_row_llama_cpp_aborts_unless_the_table_was_extended(exported, longer, llama_cpp):
    """1,101 tokens at -c 4096: what people would run."""
    settings = ["-c", "4096", "-n", "2", "--temp", "0", "-no-cnv", "--no-warmup", "-p", " the" * 1100]
    without, extended = (
        subprocess.run(
            [llama_cpp.program("llama-completion"), "-m", file.path, *settings],
            env=os.environ | {"GGML_NO_BACKTRACE": "1"},
            capture_output=True,
        ).returncode
        for file in (exported, longer)
    )
    assert without == -signal.SIGABRT
    assert extended == 0


def test_llama_cpp_predicts_what_torch_predicts_past_the_rows_the_model_was_trained_with(
    longer, toy, llama_cpp, tmp_path
):
    ids = [50256, *(n * 7 % 50000 for n in range(1999))]
    (theirs,) = logits(llama_cpp, longer.path, [ids])
    model = rounded_model(GgufContents(longer.path), with_context(toy[0].path, 4096, tmp_path))
    (ours,) = torch_logits(model, [ids])
    assert prove_measure([(ours[1024:], torch.from_numpy(theirs[1024:]))])["rms"] < 0.002


def test_a_sequence_longer_than_the_file_has_positions_for_is_an_error_in_words(exported, longer, llama_cpp):
    ids = [50256] * 1025
    with pytest.raises(CheckFailed, match="a sequence of 1025 tokens is longer than the model's context of 1024"):
        list(logits(llama_cpp, exported.path, [ids]))
    assert len(next(iter(logits(llama_cpp, longer.path, [ids])))) == 1025


@pytest.mark.slow
def test_a_checkpoint_that_was_extended_is_exported_as_it_is(longer, toy, llama_cpp, tmp_path):
    model, corpus, tokens = toy
    trained = with_context(model.path, 4096, tmp_path / "extended")
    weights = load_file(trained / "model.safetensors")
    weights["transformer.wpe.weight"][3000] += 1
    save_file(weights, trained / "model.safetensors", metadata={"format": "pt"})
    cfg = ExportConfig(context=4096)
    file = export(replace(model, path=trained), corpus, tokens, cfg, tools=llama_cpp, name="x", out=tmp_path)
    ours, theirs = (GgufContents(f.path).tensors["position_embd.weight"].data for f in (file, longer))
    assert np.flatnonzero((ours != theirs).any(axis=1)).tolist() == [3000]


@pytest.fixture(scope="module")
def toy_llama(toy_gpt2, tmp_path_factory):
    """Grouped-query, with a head of its own."""
    out = tmp_path_factory.mktemp("toy-llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(toy_gpt2 / name, out)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50257, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=50256, eos_token_id=50256,
        tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(out)
    return out


def test_a_llama_cannot_be_given_more_positions(toy_llama, llama_cpp, tmp_path):
    with pytest.raises(ConfigError, match="the base model is a llama, whose 256 positions are rotary"):
        export(*inputs(toy_llama, tmp_path), ExportConfig(context=4096), tools=llama_cpp, name="l", out=tmp_path)


def test_a_llama_with_grouped_heads_and_its_own_head_is_exported(toy_llama, llama_cpp, tmp_path):
    result = export(*inputs(toy_llama, tmp_path), ExportConfig(), tools=llama_cpp, name="l", out=tmp_path)
    assert result.facts["proof"]["tensors_equal"] == 3 + 9 * 2
    assert result.facts["matrices"] == 14
    assert result.facts["matrix_types"]["output"] == {"F16": 1}


@pytest.mark.slow
def test_smollm2_is_exported_with_its_begin_token_on(smollm_gguf, llama_cpp, tmp_path):
    from pipeline.base_model import save_tokenizer
    from pipeline.gguf_model import model_from_gguf

    checkpoint = tmp_path / "checkpoint"
    model, tokenizer = model_from_gguf(smollm_gguf)
    model.save_pretrained(checkpoint)
    save_tokenizer(tokenizer, checkpoint)
    result = export(*inputs(checkpoint, tmp_path), ExportConfig(), tools=llama_cpp, name="s", out=tmp_path)
    assert result.facts["proof"]["tensors_equal"] == 272
    assert result.facts["proof"]["logits"]["rms"] < 0.003
    assert result.facts["metadata"]["tokenizer.ggml.add_bos_token"] is True
    assert result.facts["metadata"]["tokenizer.ggml.pre"] == "smollm"


def test_tokens_are_proved_over_more_quotes_than_one_batch(exported, toy, llama_cpp, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_proof, "BATCH", 7)
    assert prove_tokens(exported.path, corpus_in(tmp_path), toy[0].path, llama_cpp) == 45
