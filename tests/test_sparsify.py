import pytest
import torch
from transformers import AutoModelForCausalLM

from pipeline import sparsity
from pipeline.artifacts import Checkpoint
from pipeline.config import SparsityConfig
from pipeline.errors import CheckFailed, ConfigError
from pipeline.matrices import block_matrices, weight_of
from pipeline.sparsify import sparsify


@pytest.fixture
def dense(toy_gpt2):
    return Checkpoint.of(toy_gpt2, {})


def weights(path):
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model, {name: weight_of(module) for name, module in block_matrices(model).items()}


@pytest.mark.parametrize("method", sparsity.methods())
def test_every_block_matrix_gets_exactly_the_asked_share_and_nothing_else_changes(dense, method, tmp_path):
    result = sparsify(dense, SparsityConfig(method=method, ratio=0.5), seed=1, out=tmp_path)
    before, _ = weights(dense.path)
    after, pruned = weights(result.path)
    assert len(pruned) == 8  # 4 a block: a GPT-2 of 2 layers
    assert all(int((w == 0).sum()) == w.numel() // 2 for w in pruned.values())
    assert result.facts["zeros"] == 0.5
    touched = {f"{name}.weight" for name in pruned}
    for name, parameter in before.named_parameters():
        assert (name in touched) != torch.equal(parameter, after.get_parameter(name)), name
    assert after.lm_head.weight.data_ptr() == after.transformer.wte.weight.data_ptr()


def test_surviving_weights_keep_their_values(dense, tmp_path):
    result = sparsify(dense, SparsityConfig(), seed=1, out=tmp_path)
    _, before = weights(dense.path)
    _, after = weights(result.path)
    for name, pruned in after.items():
        assert torch.equal(pruned[pruned != 0], before[name][pruned != 0])


def test_magnitude_drops_the_smallest_weights(dense, tmp_path):
    _, before = weights(dense.path)
    _, after = weights(sparsify(dense, SparsityConfig(), seed=1, out=tmp_path).path)
    for name, pruned in after.items():
        gone = before[name][pruned == 0].abs().max()
        assert gone <= before[name][pruned != 0].abs().min()


def test_random_is_seeded_and_differs_between_seeds(dense, tmp_path):
    hashes = []
    for i, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(i)
        out.mkdir()
        hashes.append(sparsify(dense, SparsityConfig(method="random"), seed=seed, out=out).sha256)
    assert hashes[0] == hashes[1] != hashes[2]


def test_ratio_zero_is_the_identity(dense, tmp_path):
    _, before = weights(dense.path)
    _, after = weights(sparsify(dense, SparsityConfig(ratio=0), seed=1, out=tmp_path).path)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_two_of_four_holds_along_the_input_side_of_conv1d(dense, tmp_path):
    result = sparsify(dense, SparsityConfig(pattern="2:4"), seed=1, out=tmp_path)
    _, after = weights(result.path)
    assert all((w.reshape(-1, 4) != 0).sum(1).max() == 2 for w in after.values())


def test_global_scope_meets_the_ratio_over_all_matrices(dense, tmp_path):
    result = sparsify(dense, SparsityConfig(ratio=0.3, scope="global"), seed=1, out=tmp_path)
    _, after = weights(result.path)
    zeros, total = sum(int((w == 0).sum()) for w in after.values()), sum(w.numel() for w in after.values())
    assert zeros == round(0.3 * total)


def test_an_unknown_method_is_refused_with_the_list(dense, tmp_path):
    with pytest.raises(ConfigError, match="magnitude, random"):
        sparsify(dense, SparsityConfig(method="magic"), seed=1, out=tmp_path)


def test_a_pattern_that_does_not_divide_the_rows_is_refused(dense, tmp_path):
    with pytest.raises(ConfigError, match="multiples of 3"):
        sparsify(dense, SparsityConfig(pattern="1:3", ratio=2 / 3), seed=1, out=tmp_path)


def test_a_nan_stops_the_job(dense, tmp_path):
    model, pruned = weights(dense.path)
    next(iter(pruned.values()))[0, 0] = float("nan")
    broken = tmp_path / "broken"
    model.save_pretrained(broken)
    (broken / "tokenizer.json").write_bytes((dense.path / "tokenizer.json").read_bytes())
    (tmp_path / "out").mkdir()
    with pytest.raises(CheckFailed, match="not finite"):
        sparsify(Checkpoint.of(broken, {}), SparsityConfig(), seed=1, out=tmp_path / "out")
