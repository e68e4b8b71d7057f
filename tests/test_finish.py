import itertools
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import child, distill
from pipeline import finish as stage
from pipeline.artifacts import Checkpoint, GgufFile, GgufSet, sha256_of
from pipeline.config import FinishConfig
from pipeline.encode import encode_model
from pipeline.errors import CheckFailed
from pipeline.export import convert
from pipeline.finish import finish
from pipeline.gguf_f16 import store_as_f16
from pipeline.gguf_file import GgufContents
from pipeline.gguf_names import matrix_names
from pipeline.gguf_proof import measure
from pipeline.gguf_weights import load_weights, read_kquants, write_kquants
from pipeline.kept_zeros import require_zeros
from pipeline.llama_cpp import logits, quantize
from pipeline.matrices import block_matrices, weight_of
from pipeline.scoring import torch_logits
from tests.calibrated import calibration_in
from tests.test_distill import Died, die_after, kept
from tests.test_recover import half_zero

SEQUENCES = [[50256, *range(n, n + 10), 50256] for n in range(100, 900, 80)]
CFG = FinishConfig(steps=4, batch_tokens=64, learning_rate=3e-4, precision="fp32")


on_gpt2 = pytest.mark.parametrize("tuned", ["toy_gpt2"], indirect=True, scope="module")
on_both = pytest.mark.parametrize("tuned", ["toy_gpt2", "wide_llama"], indirect=True, scope="module")


@pytest.fixture(scope="module")
def tuned(request, tmp_path_factory):
    """With block matrices so large that rounding them shows in the predictions."""
    given, folder = Checkpoint(request.getfixturevalue(request.param), ""), tmp_path_factory.mktemp("tuned")
    model = AutoModelForCausalLM.from_pretrained(given.path, dtype=torch.float32)
    with torch.no_grad():
        for module in block_matrices(model).values():
            weight_of(module).mul_(4)
    model.save_pretrained(folder)
    given.copy_tokenizer(folder)
    return Checkpoint.of(folder, {})


@pytest.fixture(scope="module")
def recovered(tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("recovered")
    model = half_zero(AutoModelForCausalLM.from_pretrained(tuned.path, dtype=torch.float32))
    model.save_pretrained(folder)
    tuned.copy_tokenizer(folder)
    return Checkpoint.of(folder, {})


@pytest.fixture(scope="module")
def calibration(tmp_path_factory):
    return calibration_in(tmp_path_factory.mktemp("calibration"), SEQUENCES)


def described(path, kind="Q2_K"):
    return GgufFile(path, sha256_of(path), path.stat().st_size, kind, GgufContents(path).describe())


@pytest.fixture(scope="module")
def quantized(recovered, llama_cpp, tmp_path_factory):
    """By llama-quantize: finishing trains whatever the codes are."""
    folder = tmp_path_factory.mktemp("quantized")
    convert(recovered.path, llama_cpp, "toy", folder / "toy-F16.gguf")
    child.run([llama_cpp.program("llama-quantize"), folder / "toy-F16.gguf", folder / "toy-Q2_K.gguf", "Q2_K", "1"])
    return described(folder / "toy-Q2_K.gguf")


@pytest.fixture
def run(recovered, tuned, calibration, tmp_path):
    def finished(file, name="out", seed=1, adapting=False, keep_zeros=False, **settings):
        out = tmp_path / name
        out.mkdir()
        cfg = CFG.model_copy(update=settings)
        given = {"adapting": adapting, "keep_zeros": keep_zeros, "device": "cpu", "seed": seed, "out": out}
        result = finish(GgufSet((file,)), recovered, tuned, calibration, cfg, **given)
        assert result.files[0].path == out / file.path.name
        return result.files[0]

    return finished


@pytest.fixture
def student(monkeypatch):
    """The model as it was trained, in a list."""
    trained = []
    write = stage.write_vectors

    def seen(model, path):
        trained.append(model)
        write(model, path)

    monkeypatch.setattr(stage, "write_vectors", seen)
    return trained


def model_of(recovered, path):
    model = AutoModelForCausalLM.from_pretrained(recovered.path, dtype=torch.float32).eval()
    load_weights(model, path)
    return model


def changed_tensors(before, after):
    one, other = GgufContents(before.path).tensors, GgufContents(after.path).tensors
    return {name for name, tensor in one.items() if not np.array_equal(tensor.data, other[name].data)}


def types_of(file, names):
    tensors = GgufContents(file.path).tensors
    return {tensors[name].tensor_type.name for name in names}


@on_both
def test_the_matrices_learn_on_their_grid_and_the_file_keeps_its_types_and_its_size(run, quantized, recovered):
    finished = run(quantized)
    facts = finished.facts["finish"]
    assert facts["validation_kl"] < facts["validation_kl_before"]
    assert facts["steps"] == 4 and facts["precision"] == "fp32"
    assert finished.size_bytes == quantized.size_bytes and finished.sha256 != quantized.sha256
    assert finished.facts["tensor_types"] == quantized.facts["tensor_types"]
    assert types_of(finished, changed_tensors(quantized, finished)) == {"F32", "Q2_K", "Q3_K"}
    header = GgufContents(quantized.path).header_bytes
    assert finished.path.read_bytes()[:header] == quantized.path.read_bytes()[:header]
    model = model_of(recovered, quantized.path)
    before, after = (read_kquants(model, file.path) for file in (quantized, finished))
    assert all(torch.equal(k.codes, after[name].codes) for name, k in before.items())
    assert any(not torch.equal(k.d, after[name].d) for name, k in before.items())
    assert all(torch.equal(k.scales, after[name].scales) for name, k in before.items())


@on_both
def test_what_was_trained_is_what_is_in_the_file_and_llama_cpp_computes_with_it(
    run, quantized, recovered, student, llama_cpp
):
    finished = run(quantized)
    (trained,), stored = student, model_of(recovered, finished.path)
    by_name = dict(trained.named_parameters())
    for name, found in stored.named_parameters():
        assert torch.equal(found, by_name[name]), name
    (ours,), (theirs,) = torch_logits(trained, SEQUENCES[:1]), logits(llama_cpp, finished.path, SEQUENCES[:1])
    pair = ours.log_softmax(-1), torch.from_numpy(theirs).log_softmax(-1)
    assert measure([pair])["rms"] < 0.05  # llama.cpp rounds what goes into a k-quant matrix to 8 bits


@on_both
def test_vectors_alone_change_nothing_that_is_quantized(run, quantized):
    finished = run(quantized, train="vectors")
    assert types_of(finished, changed_tensors(quantized, finished)) == {"F32"}
    assert finished.facts["finish"]["validation_kl"] < finished.facts["finish"]["validation_kl_before"]
    assert finished.facts["finish"]["trained_parameters"] == sum(
        int(tensor.n_elements) for tensor in GgufContents(quantized.path).tensors.values()
        if tensor.tensor_type.name == "F32"
    )  # fmt: skip


@on_gpt2
@pytest.mark.parametrize(
    ("adapting", "kind", "rate"),
    [
        (True, "Q2_K", stage.ADAPTED_VECTOR_RATE),
        (True, "Q3_K_S", stage.VECTOR_RATE),
        (False, "Q2_K", stage.VECTOR_RATE),
    ],
)
def test_norms_and_biases_take_smaller_steps_where_adapting_has_trained_them(
    run, quantized, recovered, adapting, kind, rate, llama_cpp, tmp_path, monkeypatch
):
    seen = []

    def look(student, teacher, train, validation, groups, recipe, **given):
        seen.extend(group.rate for group in groups)
        return distill.distill(student, teacher, train, validation, groups, recipe, **given)

    monkeypatch.setattr(stage, "distill", look)
    path = tmp_path / f"toy-{kind}.gguf"
    quantize(llama_cpp, quantized.path.with_name("toy-F16.gguf"), path, kind, [])
    run(described(path, kind), adapting=adapting, train="vectors", steps=1)
    assert seen == [1.0, rate]


@on_gpt2
@pytest.mark.parametrize("train", ["all", "vectors"])
def test_a_file_that_training_does_not_make_better_stays_byte_for_byte(run, quantized, train, monkeypatch):
    losses = itertools.count()
    monkeypatch.setattr(distill, "validate", lambda *args: float(next(losses)))
    finished = run(quantized, train=train)
    assert finished.facts["finish"]["steps"] > 0
    assert finished.facts["finish"]["best_step"] == 0
    assert finished.sha256 == quantized.sha256 == sha256_of(finished.path)


@on_gpt2
def test_the_same_seed_gives_the_same_file(run, quantized):
    assert run(quantized, "one").sha256 == run(quantized, "two").sha256


@on_gpt2
def test_pruned_weights_of_symmetric_types_stay_zero(run, quantized, recovered):
    finished = run(quantized)
    for name, share in quantized.facts["zeros_by_tensor"].items():
        if types_of(finished, [name]) == {"Q3_K"}:
            assert finished.facts["zeros_by_tensor"][name] >= 0.4999, name
            assert share >= 0.4999


@on_both
def test_zeros_that_were_kept_are_kept(run, quantized, recovered, tmp_path, monkeypatch):
    losses = itertools.count(0, -1)
    monkeypatch.setattr(distill, "validate", lambda *args: float(next(losses)))  # what was trained is taken
    file = tmp_path / quantized.path.name
    shutil.copy(quantized.path, file)
    model = AutoModelForCausalLM.from_pretrained(recovered.path, dtype=torch.float32).eval()
    pruned = {name: weight_of(module) == 0 for name, module in block_matrices(model).items()}
    names = matrix_names(model.config, pruned)
    types = {name: GgufContents(file).tensors[tensor].tensor_type.name for name, tensor in names.items()}
    write_kquants(model, file, encode_model(model, SEQUENCES, types, keep_zeros=True))
    finished = run(described(file), keep_zeros=True)
    assert finished.sha256 != sha256_of(file)
    assert finished.facts["zeros"] > 0.4999 > quantized.facts["zeros"]
    require_zeros(model, finished.path, pruned)


@on_gpt2
def test_positions_that_the_file_keeps_in_f16_are_not_trained(run, quantized, recovered, student, tmp_path):
    """They could not be written back: what was trained would not be what ships."""
    name = "position_embd.weight"
    file = tmp_path / quantized.path.name
    shutil.copy(quantized.path, file)
    store_as_f16(file, name)
    finished = run(described(file))
    stored = GgufContents(finished.path).tensors[name]
    assert stored.tensor_type.name == "F16" and np.array_equal(stored.data, GgufContents(file).tensors[name].data)
    by_name = dict(student[0].named_parameters())
    for key, found in model_of(recovered, finished.path).named_parameters():
        assert torch.equal(found, by_name[key]), key


@on_gpt2
@pytest.mark.parametrize(("kind", "steps", "reason"), [("Q2_K", 0, "finish.steps is 0"), ("F16", 5, "F16 has nothing")])
def test_what_is_not_to_be_trained_goes_on_as_it_is(run, quantized, kind, steps, reason):
    finished = run(replace(quantized, type=kind), steps=steps)
    assert finished.facts["finish"]["reason"].startswith(reason)
    assert (finished.sha256, finished.size_bytes) == (quantized.sha256, quantized.size_bytes)
    assert sha256_of(finished.path) == quantized.sha256
    assert finished.facts["tensor_types"] == quantized.facts["tensor_types"]


@on_gpt2
def test_zeros_that_are_lost_are_found(run, quantized):
    with pytest.raises(CheckFailed, match=r"\d+ pruned weights of \S+ in toy-Q2_K\.gguf have a value again"):
        run(quantized, keep_zeros=True, steps=1)  # llama-quantize's Q2_K has no zeros


@on_gpt2
def test_of_several_files_each_goes_on_from_checkpoints_of_its_own(
    quantized, recovered, tuned, calibration, run, tmp_path
):
    other = tmp_path / "other-Q2_K.gguf"
    shutil.copyfile(quantized.path, other)
    files = GgufSet((quantized, described(other)))
    whole = run(quantized)
    given = {"adapting": False, "keep_zeros": False, "device": "cpu", "seed": 1, "out": tmp_path / "died"}
    given["checkpoints"] = kept(tmp_path / "kept")
    given["out"].mkdir()
    with pytest.MonkeyPatch.context() as patch:
        die_after(3, patch)
        with pytest.raises(Died):
            finish(files, recovered, tuned, calibration, CFG, **given)
    again = finish(files, recovered, tuned, calibration, CFG, **given).files
    assert [file.facts["finish"]["resumed"] for file in again] == [2, 0]
    assert {file.sha256 for file in again} == {whole.sha256}
