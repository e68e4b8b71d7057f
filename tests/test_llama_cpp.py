import os
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import child
from pipeline import llama_cpp as engine
from pipeline.config import ExportConfig
from pipeline.errors import CheckFailed, ConfigError
from pipeline.export import convert, export
from pipeline.llama_cpp import Generation
from tests.exported import inputs

SETTINGS = {"temperature": 0.8, "top_p": 0.95, "repeat_penalty": 1.1}
GREEDY = {"temperature": 0, "top_p": 1, "repeat_penalty": 1}


@pytest.fixture(scope="module")
def gguf(toy_gpt2, llama_cpp, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "toy.gguf"
    convert(toy_gpt2, llama_cpp, "toy", path)
    return path


def test_a_missing_build_names_the_script_that_makes_it(tmp_path):
    with pytest.raises(ConfigError, match=r"BUILD\.json is missing; run scripts/build_llama_cpp\.sh"):
        engine.find(str(tmp_path))


def test_a_build_with_a_program_less_is_not_taken(llama_cpp, tmp_path):
    copy = shutil.copytree(llama_cpp.root, tmp_path / "copy", copy_function=os.symlink)
    (copy / "bin" / "llama-probe").unlink()
    with pytest.raises(ConfigError, match=r"bin/llama-probe is missing"):
        engine.find(str(copy))


def test_a_moved_build_is_the_same_build(llama_cpp, tmp_path):
    moved = shutil.copytree(llama_cpp.root, tmp_path / "moved", copy_function=os.symlink)
    assert engine.find(str(moved)).identity == llama_cpp.identity


def test_the_cache_is_looked_for_where_xdg_says(llama_cpp, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    place = tmp_path / "quotesmith" / "llama.cpp"
    place.mkdir(parents=True)
    (place / "current").symlink_to(llama_cpp.root)
    assert engine.find() == llama_cpp


def test_logits_come_in_order_and_do_not_depend_on_what_came_before(gguf, llama_cpp):
    sequences = [[50256, 40, 1101], [50256], [50256, 464, 2068, 7586, 21831], [50256, 40, 1101]]
    first, single, longer, again = engine.logits(llama_cpp, gguf, sequences)
    assert [table.shape for table in (first, single, longer)] == [(3, 50257), (1, 50257), (5, 50257)]
    assert np.array_equal(first, again)
    np.testing.assert_allclose(first[0], single[0], atol=1e-3)


def test_a_quote_of_a_single_token_is_scored_by_itself(gguf, llama_cpp):
    """llama-perplexity wants two contexts full, and gives no number for less: it is not what this uses."""
    (found,) = engine.logits(llama_cpp, gguf, [[50256, 11]])
    assert found.shape == (2, 50257) and np.isfinite(found).all()
    assert not {"llama-perplexity", "llama-imatrix"} & set(engine.PROGRAMS)


def test_logits_agree_with_torch_past_one_batch_of_tokens(gguf, toy_gpt2, llama_cpp):
    """300 tokens: three batches, and a context that has to grow."""
    ids = torch.randint(50256, (1, 300), generator=torch.Generator().manual_seed(0))
    model = AutoModelForCausalLM.from_pretrained(toy_gpt2, dtype=torch.float32).eval()
    with torch.inference_mode():
        needed = model(ids).logits[0].numpy()
    (found,) = engine.logits(llama_cpp, gguf, [ids[0].tolist()])
    assert np.sqrt(np.square(found - needed).mean()) < 0.01 * needed.std()


def test_a_sequence_beyond_the_position_table_is_refused_not_an_abort(gguf, llama_cpp):
    assert len(next(engine.logits(llama_cpp, gguf, [[11] * 1024]))) == 1024
    with pytest.raises(CheckFailed, match=r"a sequence of 1025 tokens is longer than the model's context of 1024$"):
        list(engine.logits(llama_cpp, gguf, [[11] * 1025]))


@pytest.mark.parametrize("token", [-1, 50257])
def test_an_id_outside_the_vocabulary_is_refused(gguf, llama_cpp, token):
    with pytest.raises(CheckFailed, match=f"token id {token} is outside the vocabulary of 50257"):
        list(engine.logits(llama_cpp, gguf, [[11, token]]))


def test_a_file_that_is_no_model_is_refused(llama_cpp, tmp_path):
    (tmp_path / "x.gguf").write_text("no model")
    with pytest.raises(CheckFailed, match="llama-probe: cannot load"):
        list(engine.logits(llama_cpp, tmp_path / "x.gguf", [[11]]))


def test_many_texts_and_long_ones_stream_through_without_deadlock(gguf, llama_cpp):
    """More than any pipe buffer holds, both in one text and in all of them."""
    texts = ["", "word " * 60_000, *(f"text {n}" for n in range(3000))]
    ids = list(engine.tokenize(llama_cpp, gguf, texts))
    assert ids[0] == []
    assert len(ids[1]) == 60_001
    assert len(ids) == 3002


def test_markup_in_a_text_is_text(gguf, llama_cpp):
    (ids,) = engine.tokenize(llama_cpp, gguf, ["a<|endoftext|>"])
    assert len(ids) > 2
    assert 50256 not in ids


def test_a_reader_that_stops_early_leaves_no_process_behind(gguf, llama_cpp, monkeypatch):
    started = []

    class Popen(child.subprocess.Popen):
        def __init__(self, *args, **kwargs):
            started.append(self)
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(child.subprocess, "Popen", Popen)
    tables = engine.logits(llama_cpp, gguf, [[11], [12]])
    next(tables)
    assert started[0].poll() is None
    tables.close()
    assert started[0].returncode is not None


def test_generations_repeat_with_their_seed_and_keep_to_the_limit(gguf, llama_cpp):
    one, same, other = (
        engine.generate(llama_cpp, gguf, "I", seed=seed, max_new_tokens=8, **SETTINGS) for seed in (1, 1, 2)
    )
    assert one == same != other
    (ids,) = engine.tokenize(llama_cpp, gguf, [one.text])
    assert 0 < len(ids) <= 8


@pytest.mark.parametrize("prompt", ["", "-p", "a\\nb", "quotes \" and ' and $HOME", "two\nlines\n", "<|endoftext|>"])
def test_any_prompt_is_continued_as_its_logits_say(gguf, llama_cpp, prompt):
    """Greedy, one token. llama-completion fails this: it drops a last line end, and ends at once without a prompt."""
    (ids,) = engine.tokenize(llama_cpp, gguf, [prompt])
    (table,) = engine.logits(llama_cpp, gguf, [[50256, *ids]])
    found = engine.generate(llama_cpp, gguf, prompt, seed=1, max_new_tokens=1, **GREEDY)
    best = int(table[-1].argmax())
    if best == 50256:
        assert found == Generation("", True)
    else:
        assert list(engine.tokenize(llama_cpp, gguf, [found.text])) == [[best]]
        assert not found.stopped


def test_a_text_ends_at_the_models_context_not_in_an_abort(gguf, llama_cpp):
    prompt = " the" * 1000
    found = engine.generate(llama_cpp, gguf, prompt, seed=3, max_new_tokens=2000, **SETTINGS)
    (ids,) = engine.tokenize(llama_cpp, gguf, [found.text])
    assert found.stopped or len(ids) < 100  # 23 new ones; read back, the bytes of a random model split otherwise
    with pytest.raises(CheckFailed, match="the prompt fills the model's context of 1024"):
        engine.generate(llama_cpp, gguf, " the" * 1024, seed=3, max_new_tokens=1, **SETTINGS)


def test_repeats_are_penalized(gguf, llama_cpp):
    """A random tied GPT-2 likes to say its last word again; a heavy penalty forbids that."""
    settings = GREEDY | {"repeat_penalty": 1e6}
    plain = engine.generate(llama_cpp, gguf, " the", seed=1, max_new_tokens=40, **GREEDY)
    varied = engine.generate(llama_cpp, gguf, " the", seed=1, max_new_tokens=40, **settings)
    (few,), (many,) = (engine.tokenize(llama_cpp, gguf, [g.text]) for g in (plain, varied))
    assert len(set(few)) < len(set(many))


@pytest.mark.slow
def test_the_program_on_the_model_card_writes_the_same(standin, llama_cpp, tmp_path):
    """Asked for more words than are compared: its logger may drop the last 511 when the program ends."""
    file = export(*inputs(standin, tmp_path), ExportConfig(), tools=llama_cpp, name="s", out=tmp_path)
    found = engine.generate(llama_cpp, file.path, "I think", seed=1, max_new_tokens=12, **GREEDY)
    assert not found.stopped
    command = [llama_cpp.program("llama-completion"), "-m", file.path, "-p", "I think", "-n", "700", "--temp", "0"]
    text = child.run([*command, "--ignore-eos", "-no-cnv", "--no-display-prompt"]).stdout
    assert len(found.text) > 20 and text.startswith(found.text)


@pytest.mark.slow
def test_a_trained_model_stops_by_itself_or_at_the_limit(standin, llama_cpp, tmp_path):
    file = export(*inputs(standin, tmp_path), ExportConfig(), tools=llama_cpp, name="s", out=tmp_path)
    short = engine.generate(llama_cpp, file.path, "I think", seed=1, max_new_tokens=3, **SETTINGS)
    long = engine.generate(llama_cpp, file.path, "I think", seed=1, max_new_tokens=200, **SETTINGS)
    assert not short.stopped
    assert long.stopped
    assert long.text.startswith(short.text)
    assert "end of text" not in long.text


def test_speed_and_memory_are_measured(gguf, llama_cpp):
    speed = engine.bench(llama_cpp, gguf)
    assert speed.prompt_tokens_per_second > 0
    assert speed.generation_tokens_per_second > 0
    assert gguf.stat().st_size / 2 < speed.peak_bytes < 1 << 30
