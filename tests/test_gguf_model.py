import subprocess
import sys

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline import llama_cpp
from pipeline.errors import ConfigError, DataError
from pipeline.gguf_model import model_from_gguf, tokenizer_from_gguf

TRICKY = [
    "Hello world", " Hello  world ", "\n \n\n\t x", "I've 'told he's 'RE we'll", "3 33 333 3.3 2024",
    "Äpfel нещо 我想在apple工作1314", "🚀 (normal) 😶\u200d🌫️ ✅", "“curly” — ‘marks’ … !!!???", "<tag>&amp;\x00\x7f",
]  # fmt: skip


def write_gguf(path, architecture="llama", pre="gpt-2", kind="gpt2"):
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_tokenizer_model(kind)
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["a", "b", "ab", "<end>", "<mark>"])
    writer.add_token_types([1, 1, 1, 3, 4])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("model", ["gpt2_vocab", "smollm_gguf"])
def test_ids_are_those_of_llama_cpp(model, request):
    path = request.getfixturevalue(model)
    tokenizer = tokenizer_from_gguf(path)
    ids = [tokenizer.encode(text) for text in TRICKY]
    assert ids == list(llama_cpp.tokenize(llama_cpp.find(), path, TRICKY))
    assert [tokenizer.decode(row) for row in ids] == TRICKY


@pytest.mark.slow
@pytest.mark.parametrize(("model", "pre"), [("gpt2_vocab", "gpt-2"), ("smollm_gguf", "smollm")])
def test_the_converter_knows_the_saved_pre_tokenizer_by_its_hash(model, pre, request, tmp_path):
    tokenizer_from_gguf(request.getfixturevalue(model)).save_pretrained(tmp_path)
    ask = (
        "import sys; from transformers import AutoTokenizer; from conversion.base import TextModel; "
        "print(TextModel.get_vocab_base_pre(None, AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", ask, str(tmp_path)],
        cwd=llama_cpp.find().root / "convert",
        env={"PYTHONPATH": "gguf-py"},
        capture_output=True,
        text=True,
    )
    assert answer.stdout.strip() == pre, answer.stderr


def test_special_tokens_keep_their_ids_and_are_matched_whole(tmp_path):
    tokenizer = tokenizer_from_gguf(write_gguf(tmp_path / "m.gguf"))
    assert tokenizer.encode("ab<end>b<mark>") == [2, 3, 1, 4]
    assert tokenizer.eos_token_id == 3 and tokenizer.bos_token is None
    assert tokenizer.decode([2, 3, 4], skip_special_tokens=True) == "ab<mark>"
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).encode("ab<end>b<mark>") == [2, 3, 1, 4]


@pytest.mark.parametrize("wrong", [{"pre": "llama-bpe"}, {"kind": "llama"}])
def test_an_unknown_pre_tokenizer_is_refused_with_the_list(wrong, tmp_path):
    with pytest.raises(ConfigError, match="gpt-2, smollm"):
        tokenizer_from_gguf(write_gguf(tmp_path / "m.gguf", **wrong))


def test_another_architecture_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="architecture gpt2, but only llama"):
        model_from_gguf(write_gguf(tmp_path / "m.gguf", architecture="gpt2"))


def test_a_torn_file_is_bad_data(smollm_gguf, tmp_path):
    torn = tmp_path / "torn.gguf"
    with smollm_gguf.open("rb") as file:
        whole = file.read(8_000_000)
    for size in (0, 3, 1000, 100_000, len(whole)):
        torn.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"torn\.gguf"):
            model_from_gguf(torn)


def test_a_file_of_something_else_is_bad_data(tmp_path):
    (tmp_path / "m.gguf").write_text("not a model at all" * 100)
    with pytest.raises(DataError, match="not a whole GGUF"):
        tokenizer_from_gguf(tmp_path / "m.gguf")


@pytest.mark.slow
def test_the_weights_are_those_llama_cpp_computes_with(smollm_gguf, tmp_path):
    model, tokenizer = model_from_gguf(smollm_gguf)
    assert model.dtype == torch.float32 and model.config.tie_word_embeddings
    ids = tokenizer.encode("The capital of France is")
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0]
    (theirs,) = llama_cpp.logits(llama_cpp.find(), smollm_gguf, [ids])
    assert (ours.argmax(-1) == torch.from_numpy(theirs).argmax(-1)).all()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not hasattr(again.config, "quantization_config")
    assert torch.equal(again.model.layers[29].mlp.up_proj.weight, model.model.layers[29].mlp.up_proj.weight)
