import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from pipeline import sparsity
from pipeline.artifacts import Checkpoint
from pipeline.calibrate import load_calibration
from pipeline.config import SparsityConfig
from pipeline.device import Precision
from pipeline.errors import CheckFailed, ConfigError
from pipeline.masks import row_mask
from pipeline.matrices import block_matrices, weight_of
from pipeline.sparsify import measure, prune_model, sparsify
from tests.calibrated import calibration_in

KEEPERS = ("magnitude", "random", "wanda")  # sparsegpt moves the weights that stay
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=24, n_layer=2, n_head=2))


def llama():
    shape = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, tie_word_embeddings=True, **shape))


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    found = {}
    for make in (gpt2, llama):
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(make.__name__)
        make().save_pretrained(folder)
        for name in TOKENIZER:  # only copied
            (folder / name).write_text("{}")
        found[make.__name__] = Checkpoint.of(folder, {})
    return found


@pytest.fixture
def dense(checkpoints):
    return checkpoints["gpt2"]


@pytest.fixture
def calibration(tmp_path):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 20, (30,), generator=generator).tolist()
    sequences = [torch.randint(0, 64, (length,), generator=generator).tolist() for length in lengths]
    return calibration_in(tmp_path, sequences)


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def sparsified(dense, calibration, out, seed=1, **settings):
    return sparsify(dense, calibration, SparsityConfig(**settings), device="cpu", seed=seed, out=out)


def loaded(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32)


def weights_of(model):
    return {name: weight_of(module) for name, module in block_matrices(model).items()}


def broken(dense, folder, name, value):
    """`dense` with one value of the parameter `name` replaced."""
    shutil.copytree(dense.path, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint.of(folder, {})


@pytest.mark.parametrize("ratio", [0.5, 0.3, 1 / 3])
@pytest.mark.parametrize("method", sparsity.methods())
@pytest.mark.parametrize(("kind", "matrices"), [("gpt2", 8), ("llama", 14)])
def test_every_block_matrix_gets_exactly_the_asked_share_and_nothing_else_changes(
    kind, matrices, method, ratio, checkpoints, calibration, out
):
    result = sparsified(checkpoints[kind], calibration, out, method=method, ratio=ratio)
    before, after = loaded(checkpoints[kind]), loaded(result)
    pruned = weights_of(after)
    assert len(pruned) == matrices
    for name, weight in pruned.items():
        zeros = int((weight == 0).sum())
        assert zeros == round(ratio * weight.numel()), name
        assert result.facts["zeros_per_matrix"][name] == zeros / weight.numel()
    touched = {f"{name}.weight" for name in pruned}
    for name, parameter in before.named_parameters():
        assert (name in touched) != torch.equal(parameter, after.get_parameter(name)), name
    assert after.get_output_embeddings().weight.data_ptr() == after.get_input_embeddings().weight.data_ptr()
    for name in TOKENIZER:
        assert (result.path / name).read_bytes() == (checkpoints[kind].path / name).read_bytes()


def test_the_sparse_model_of_the_true_shape_is_whole(toy_gpt2, tmp_path):
    """A third, in a model large enough that rounding the share of each matrix shows in the share of all."""
    calibration = calibration_in(tmp_path, [[50256, 11, 345, n, 50256] for n in range(20)])
    dense = Checkpoint.of(toy_gpt2, {})
    result = sparsified(dense, calibration, tmp_path, method="magnitude", ratio=1 / 3)
    assert result.facts["zeros"] == pytest.approx(1 / 3, abs=1e-5)
    assert {path.name for path in result.files()} == {path.name for path in dense.files()}


def test_code_that_looks_for_linear_layers_would_prune_the_embedding_and_nothing_else(dense, calibration, out):
    model = loaded(dense)
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert linear == {"lm_head"} and model.lm_head.weight is model.transformer.wte.weight
    result = sparsified(dense, calibration, out)
    assert len(result.facts["zeros_per_matrix"]) == result.facts["matrices"] == 4 * 2
    assert not linear & result.facts["zeros_per_matrix"].keys()
    assert torch.equal(loaded(result).lm_head.weight, model.lm_head.weight)


def test_a_gpt2_whose_blocks_are_not_what_they_should_be_is_refused(dense, calibration, out, monkeypatch):
    def only_linear(model):
        found = {f"{name}.0": nn.Linear(4, 4) for name in ("a", "b")}
        return found | {"lm_head": model.lm_head}

    monkeypatch.setattr("pipeline.sparsify.block_matrices", only_linear)
    with pytest.raises(CheckFailed, match="found 3 block matrices in a GPT-2 of 2 layers, needed 4 a layer"):
        sparsified(dense, calibration, out)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", sparsity.methods())
def test_without_refit_surviving_weights_keep_their_values_but_for_sparsegpt(method, pattern, dense, calibration, out):
    before = weights_of(loaded(dense))
    kept = []
    result = sparsified(dense, calibration, out, method=method, pattern=pattern, refit=False)
    for name, pruned in weights_of(loaded(result)).items():
        kept.append(torch.equal(pruned[pruned != 0], before[name][pruned != 0]))
    assert all(kept) if method in KEEPERS else not any(kept)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_refit_brings_the_outputs_nearer_to_the_dense_models_at_the_same_count_of_zeros(
    method, pattern, dense, calibration
):
    sequences = load_calibration(calibration, "train")
    errors, zeros = [], []
    for refit in (False, True):
        model = loaded(dense).eval()
        cfg = SparsityConfig(method=method, pattern=pattern, refit=refit)
        with torch.no_grad():
            prune_model(model, sequences, cfg, seed=1)
            pairs = [(model(torch.tensor([ids])), loaded(dense).eval()(torch.tensor([ids]))) for ids in sequences[:4]]
        errors.append(sum(float((ours.logits - theirs.logits).square().sum()) for ours, theirs in pairs))
        zeros.append({name: int((weight == 0).sum()) for name, weight in weights_of(model).items()})
    assert errors[1] < errors[0] and zeros[0] == zeros[1]


def test_magnitude_drops_the_smallest_weights_of_each_matrix(dense, calibration, out):
    before = weights_of(loaded(dense))
    for name, pruned in weights_of(loaded(sparsified(dense, calibration, out, method="magnitude"))).items():
        assert before[name][pruned == 0].abs().max() <= before[name][pruned != 0].abs().min()


def test_wanda_takes_the_same_share_from_every_row(dense, calibration, out):
    for pruned in weights_of(loaded(sparsified(dense, calibration, out, method="wanda"))).values():
        assert ((pruned == 0).sum(1) == pruned.shape[1] // 2).all()


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_what_the_model_says_on_the_calibration_text_suffers_less_than_by_magnitude(
    method, checkpoints, calibration, out
):
    """With weights large enough that the blocks decide what it says."""
    sequences = load_calibration(calibration, "train")
    errors = {}
    for name in (method, "magnitude"):
        dense, model = loaded(checkpoints["gpt2"]).eval(), loaded(checkpoints["gpt2"]).eval()
        for weight in (*weights_of(dense).values(), *weights_of(model).values()):
            weight.mul_(4)
        prune_model(model, sequences, SparsityConfig(method=name), seed=1)
        with torch.no_grad():
            differences = [model(t).logits - dense(t).logits for t in (torch.tensor([ids]) for ids in sequences)]
        errors[name] = sum(float(difference.square().sum()) for difference in differences)
    assert errors[method] < errors["magnitude"]


def test_the_second_block_is_fitted_to_what_the_pruned_first_one_makes(dense, calibration, monkeypatch):
    exact = Precision("fp32", "for exact scores")
    monkeypatch.setattr("pipeline.activations.arithmetic_of", lambda asked, device: exact)
    sequences = load_calibration(calibration, "train")
    pruned, half, whole = (loaded(dense).eval() for _ in range(3))
    for model in (pruned, half, whole):
        for weight in weights_of(model).values():
            weight.mul_(10)  # so that the first block matters to the second
    prune_model(pruned, sequences, SparsityConfig(method="wanda", refit=False), seed=1)
    half.transformer.h[0].load_state_dict(pruned.transformer.h[0].state_dict())
    for name, weight in weights_of(pruned).items():
        if ".h.1." in name:
            kept = [
                row_mask(weights_of(model)[name].abs() * norms(model, name, sequences), 0.5) for model in (half, whole)
            ]
            assert torch.equal(weight != 0, kept[0]), name
            assert not torch.equal(weight != 0, kept[1]), name


@torch.no_grad()
def norms(model, name, sequences):
    """Of the inputs of a matrix, from the whole model."""
    inputs = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    for ids in sequences:
        model(torch.tensor([ids]))
    handle.remove()
    return torch.cat(inputs).norm(dim=0)


@pytest.mark.parametrize("method", ["random", "sparsegpt"])
def test_the_same_inputs_give_the_same_model(method, dense, calibration, tmp_path):
    hashes = []
    for number, seed in enumerate((1, 1, 2)):
        (tmp_path / str(number)).mkdir()
        hashes.append(sparsified(dense, calibration, tmp_path / str(number), seed=seed, method=method).sha256)
    assert hashes[0] == hashes[1]
    assert (hashes[0] != hashes[2]) == (method == "random")  # nothing else is drawn


@pytest.mark.parametrize("method", sparsity.methods())
def test_ratio_zero_is_the_identity(method, dense, calibration, out):
    before, after = loaded(dense), loaded(sparsified(dense, calibration, out, method=method, ratio=0))
    assert all(torch.equal(parameter, after.get_parameter(name)) for name, parameter in before.named_parameters())


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("method", sparsity.methods())
def test_two_of_four_holds_in_every_group_along_the_inputs(method, kind, checkpoints, calibration, out):
    result = sparsified(checkpoints[kind], calibration, out, method=method, pattern="2:4")
    model = loaded(result)
    assert all(((w.reshape(-1, 4) != 0).sum(1) == 2).all() for w in weights_of(model).values())
    if kind == "gpt2":  # stored transposed: the groups run down its columns
        stored = model.transformer.h[0].mlp.c_fc.weight
        assert ((stored.reshape(-1, 4, stored.shape[1]) != 0).sum(1) == 2).all()


def test_one_of_three_is_two_thirds_however_it_was_rounded_in_the_config(dense, calibration, out):
    result = sparsified(dense, calibration, out, pattern="1:3", ratio=0.667)
    assert result.facts["zeros"] == 2 / 3


@pytest.mark.parametrize("ratio", [0.3, 1 / 3])
@pytest.mark.parametrize("method", ["magnitude", "random"])
def test_global_scope_meets_the_ratio_over_all_matrices(method, ratio, dense, calibration, out):
    result = sparsified(dense, calibration, out, method=method, ratio=ratio, scope="global")
    after = weights_of(loaded(result))
    zeros, total = sum(int((w == 0).sum()) for w in after.values()), sum(w.numel() for w in after.values())
    assert zeros == round(ratio * total)
    assert len(set(result.facts["zeros_per_matrix"].values())) > 1


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_global_scope_is_refused_for_methods_whose_scores_do_not_compare(method, dense, calibration, out):
    with pytest.raises(ConfigError, match=f"{method} fits each matrix by itself; choose magnitude, or .*scope matrix"):
        sparsified(dense, calibration, out, method=method, scope="global")


def test_an_unknown_method_is_refused_with_the_list(dense, calibration, out):
    with pytest.raises(ConfigError, match="magnitude, random, sparsegpt, wanda"):
        sparsified(dense, calibration, out, method="magic")


def test_a_pattern_that_does_not_divide_the_rows_is_refused(dense, calibration, out):
    with pytest.raises(ConfigError, match=r"multiples of 5, .* transformer.h.0.attn.c_attn are 24 wide"):
        sparsified(dense, calibration, out, pattern="1:5", ratio=0.8)


@pytest.mark.parametrize("method", sparsity.methods())
def test_a_method_without_its_calibration_text_is_refused_and_those_that_need_none_go_on(method, dense, tmp_path, out):
    nothing = calibration_in(tmp_path, [], [[1, 2]])
    if method in sparsity.NEED_NO_TEXT:
        assert sparsified(dense, nothing, out, method=method).facts["zeros"] == 0.5
        return
    with pytest.raises(
        ConfigError, match=rf"{method} measures the model on calibration text, and there is none; raise"
    ):
        sparsified(dense, nothing, out, method=method)
    assert not list(out.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name", ["transformer.h.1.mlp.c_fc.weight", "transformer.h.0.ln_1.weight", "transformer.wte.weight"]
)
def test_a_value_that_is_not_finite_stops_the_job_wherever_it_is(name, value, dense, calibration, tmp_path, out):
    model = broken(dense, tmp_path / "broken", name, value)
    for method in sparsity.methods():
        with pytest.raises(CheckFailed, match=f"{name} holds values that are not finite"):
            sparsified(model, calibration, out, method=method)
    assert not list(out.iterdir())


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_activations_that_overflow_stop_the_job(method, dense, calibration, tmp_path, out):
    model = broken(dense, tmp_path / "broken", "transformer.h.1.ln_2.weight", 3e38)
    with pytest.raises(CheckFailed, match=r"inputs of transformer.h.1.mlp.c_fc are not finite"):
        sparsified(model, calibration, out, method=method)


@pytest.mark.parametrize("scope", ["matrix", "global"])
def test_too_few_zeros_fail_the_check_that_measures_them(scope):
    cfg = SparsityConfig(method="magnitude", scope=scope)
    weights = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.tensor([[0.0, 1.0, 0.0, 1.0]])}
    assert measure(weights, cfg)["zeros"] == 0.5
    weights["b"][0, 2] = 1
    with pytest.raises(CheckFailed, match=r"pruned 0.3333 of the block weights, 0.5 was asked for; short in \['b'\]"):
        measure(weights, cfg)


def test_in_matrix_scope_one_matrix_cannot_make_up_for_another():
    weights = {"a": torch.tensor([[0.0, 0.0]]), "b": torch.tensor([[1.0, 1.0]])}
    with pytest.raises(CheckFailed, match="short in"):
        measure(weights, SparsityConfig())
    assert measure(weights, SparsityConfig(method="magnitude", scope="global"))["zeros"] == 0.5


def test_zeros_that_were_there_before_are_counted_apart(dense, calibration, tmp_path, out):
    model = broken(dense, tmp_path / "broken", "transformer.h.1.mlp.c_fc.weight", 0)
    assert sparsified(model, calibration, out).facts["zeros_before"] == 1


def test_the_facts_count_the_tokens_that_the_model_was_measured_on(dense, calibration, out):
    facts = sparsified(dense, calibration, out).facts
    assert facts["calibration_tokens"] == sum(map(len, load_calibration(calibration, "train")))
