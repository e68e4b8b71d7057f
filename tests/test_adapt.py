import signal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import adapt as stage
from pipeline import encode, signals
from pipeline.adapt import adapt
from pipeline.artifacts import GgufSet, sha256_of
from pipeline.checkpoints import Checkpoints
from pipeline.config import AdaptConfig, ResumeConfig
from pipeline.gguf_f16 import store_as_f16
from pipeline.gguf_file import GgufContents
from pipeline.gguf_weights import matrix_types
from pipeline.llama_cpp import quantize
from pipeline.matrices import block_matrices, weight_of
from tests.test_distill import Died, die_after, kept
from tests.test_finish import (  # noqa: F401  (fixtures)
    calibration,
    changed_tensors,
    described,
    model_of,
    on_both,
    on_gpt2,
    quantized,
    recovered,
    tuned,
    types_of,
)

CFG = AdaptConfig(steps=4, batch_tokens=64, learning_rate=3e-4, precision="fp32")


@pytest.fixture
def run(recovered, tuned, calibration, tmp_path):  # noqa: F811
    def adapted(*files, name="out", adapting=True, checkpoints=None, **settings):
        out = tmp_path / name
        out.mkdir(exist_ok=True)
        cfg = CFG.model_copy(update=settings)
        given = {"adapting": adapting, "device": "cpu", "seed": 1, "checkpoints": checkpoints}
        found = adapt(GgufSet(files), recovered, tuned, calibration, cfg, **given, out=out).files
        assert [file.path for file in found] == [out / file.path.name for file in files]
        return found if len(files) > 1 else found[0]

    return adapted


def file_in(folder, like):
    """A copy that a test may change."""
    folder.mkdir()
    path = folder / like.path.name
    path.write_bytes(like.path.read_bytes())
    return path


@on_both
def test_what_keeps_its_zeros_is_trained_and_rounded_and_nothing_else(run, quantized, recovered):  # noqa: F811
    adapted = run(quantized)
    facts = adapted.facts["adapt"]
    assert facts["validation_kl"] < facts["validation_kl_before"]
    assert (facts["steps"], facts["precision"]) == (4, "fp32")
    assert adapted.size_bytes == quantized.size_bytes and adapted.sha256 != quantized.sha256
    assert adapted.facts["tensor_types"] == quantized.facts["tensor_types"]
    changed = changed_tensors(quantized, adapted)
    assert types_of(adapted, changed) == {"F32", "Q3_K"}
    stored = GgufContents(adapted.path).tensors
    threes = {name for name, tensor in stored.items() if tensor.tensor_type.name == "Q3_K"}
    assert threes <= changed and facts["encoded_tensors"] == len(threes)
    header = GgufContents(quantized.path).header_bytes
    assert adapted.path.read_bytes()[:header] == quantized.path.read_bytes()[:header]


@on_both
def test_zeros_that_a_type_keeps_are_kept(run, quantized, recovered):  # noqa: F811
    adapted = run(quantized)
    pruned = AutoModelForCausalLM.from_pretrained(recovered.path, dtype=torch.float32)
    stored = block_matrices(model_of(recovered, adapted.path))
    types = matrix_types(pruned, adapted.path)
    for name, module in block_matrices(pruned).items():
        if types[name] == "Q3_K":
            zeros = weight_of(module) == 0
            assert zeros.float().mean() == 0.5
            assert not weight_of(stored[name])[zeros].any(), name


def parameters(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@on_both
def test_the_matrices_are_trained_beside_what_the_file_has(run, quantized, recovered, monkeypatch):  # noqa: F811
    seen = []
    encode_model = stage.encode_model

    def look(model, sequences, types, **given):
        seen.append((parameters(model), {f"{name}.weight" for name in types}))
        return encode_model(model, sequences, types, **given)

    monkeypatch.setattr(stage, "encode_model", look)
    adapted = run(quantized)
    before, after = (parameters(model_of(recovered, file.path)) for file in (quantized, adapted))
    own = parameters(AutoModelForCausalLM.from_pretrained(recovered.path, dtype=torch.float32))
    ((trained, matrices),) = seen
    for name, parameter in trained.items():
        if name in matrices:
            assert torch.equal(parameter == 0, own[name] == 0) and not torch.equal(parameter, own[name]), name
        elif parameter.ndim > 1 and not name.endswith("wpe.weight"):
            assert torch.equal(parameter, before[name]), name
        else:
            assert torch.equal(parameter, after[name]) and not torch.equal(parameter, before[name]), name


@on_gpt2
def test_the_same_seed_gives_the_same_file(run, quantized):  # noqa: F811
    assert run(quantized, name="one").sha256 == run(quantized, name="two").sha256


@on_gpt2
def test_a_file_that_is_not_to_be_adapted_stays_as_it_is(run, quantized):  # noqa: F811
    adapted = run(quantized, adapting=False)
    assert adapted.facts["adapt"] == {
        "reason": "adapt.steps is 0, quantize.encoder is llama.cpp, or sparsity.keep_zeros is true"
    }
    assert sha256_of(adapted.path) == adapted.sha256 == quantized.sha256
    assert adapted.facts["tensor_types"] == quantized.facts["tensor_types"]


@on_gpt2
@pytest.mark.parametrize("kind", ["Q3_K_S", "Q8_0"])
def test_types_that_round_no_matrix_from_before_pruning_have_nothing_to_adapt(
    run,
    quantized,  # noqa: F811
    kind,
    llama_cpp,
    tmp_path,
):
    path = tmp_path / f"toy-{kind}.gguf"
    quantize(llama_cpp, quantized.path.with_name("toy-F16.gguf"), path, kind, [])
    file = described(path, kind)
    assert run(file).facts["adapt"]["reason"].startswith("no matrix was rounded")


@on_gpt2
def test_positions_that_the_file_keeps_in_f16_are_not_trained(run, quantized, tmp_path):  # noqa: F811
    """They could not be written back: the matrices would have been fitted to others than what ships."""
    file, name = file_in(tmp_path / "extended", quantized), "position_embd.weight"
    store_as_f16(file, name)
    adapted = run(described(file))
    before, after = (GgufContents(path).tensors[name] for path in (file, adapted.path))
    assert after.tensor_type.name == "F16" and np.array_equal(before.data, after.data)


@on_gpt2
def test_of_several_files_each_goes_on_from_checkpoints_of_its_own(run, quantized, tmp_path):  # noqa: F811
    files = quantized, described(file_in(tmp_path / "other", quantized).rename(tmp_path / "other-Q2_K.gguf"))
    whole = run(quantized)
    with pytest.MonkeyPatch.context() as patch:
        die_after(3, patch)
        with pytest.raises(Died):
            run(*files, name="died", checkpoints=kept(tmp_path / "kept"))
    again = run(*files, name="died", checkpoints=kept(tmp_path / "kept"))
    assert [file.facts["adapt"]["resumed"] for file in again] == [2, 0]
    assert {file.sha256 for file in again} == {whole.sha256}


@on_gpt2
@pytest.mark.parametrize("patience", [1, 9])
def test_a_start_that_was_stopped_while_rounding_goes_on_behind_the_training(
    run,
    quantized,  # noqa: F811
    patience,
    tmp_path,
):
    """And stops behind a block: there is nothing to save, and rounding all takes minutes."""
    settings = {"patience": patience, "learning_rate": 3e-1 if patience == 1 else CFG.learning_rate}
    whole = run(quantized, **settings)
    assert (whole.facts["adapt"]["steps"] < CFG.steps) == (patience == 1)

    encoded = []
    encode_one = encode.encode_module

    def signalled(*given, **more):
        encoded.append(encode_one(*given, **more))
        if len(encoded) == 1:
            signals.on_signal(signal.SIGTERM, None)
        return encoded[-1]

    with pytest.MonkeyPatch.context() as patch, pytest.raises(signals.Stopped):
        for name in ("received", "owed"):  # put back afterwards
            patch.setattr(signals.state, name, getattr(signals.state, name))
        patch.setattr(signals.state, "grace_seconds", 3600.0)  # the alarm would kill this process, which handles none
        patch.setattr(encode, "encode_module", signalled)
        with signals.unwinding(), signals.patient():
            run(quantized, name="stopped", checkpoints=Checkpoints(tmp_path / "kept", ResumeConfig()), **settings)
    assert len(encoded) == whole.facts["adapt"]["encoded_tensors"] / 2  # of the first block of two
    with pytest.MonkeyPatch.context() as patch:
        die_after(1, patch)  # trains no step again
        again = run(quantized, name="stopped", checkpoints=Checkpoints(tmp_path / "kept", ResumeConfig()), **settings)
    facts = again.facts["adapt"]
    assert facts["resumed"] == facts["steps"] == whole.facts["adapt"]["steps"]
    assert again.sha256 == whole.sha256
