import itertools
import random
import re

import pytest

from pipeline import preflight
from pipeline.artifacts import Checkpoint, GgufFile, sha256_of
from pipeline.budget import TYPES, Option, best_mix, least, roles_of, smallest_of
from pipeline.config import QuantizeConfig
from pipeline.errors import ConfigError
from pipeline.export import convert
from pipeline.forecast import Choice, Fallback, Forecast, forecasts_of, foretell
from pipeline.gguf_file import GgufContents
from pipeline.kquants import KTYPES
from pipeline.preflight import check_model
from pipeline.quantize import quantize
from pipeline.report import output_size
from pipeline.settings import resolve
from tests import small_gpt2
from tests.calibrated import calibration_in

SPARE = 15_000
ROLES = ("attn_output", "attn_qkv", "ffn_down", "ffn_up", "token_embd")
SEQUENCES = [[257, *range(start, start + 12)] for start in range(0, 225, 15)]


def made_up(seed, roles=4):
    """Sizes grow with the type; costs mostly fall, sometimes not, and are often equal."""
    draw = random.Random(seed)
    table = {}
    for role in range(roles):
        sizes = sorted(draw.sample(range(1, 40), draw.randint(1, 5)))
        costs = sorted((draw.choice([0.0, 0.125, 0.5, draw.random()]) for _ in sizes), reverse=True)
        if draw.random() < 0.3:
            draw.shuffle(costs)
        table[f"role{role}"] = {f"T{size}": Option(size, cost) for size, cost in zip(sizes, costs, strict=True)}
    return table


def brute_force(options, max_bytes):
    """Least cost, then fewest bytes, of every combination."""
    mixes = (
        (sum(options[role][kind].cost for role, kind in zip(options, kinds, strict=True)), size_of(options, kinds))
        for kinds in itertools.product(*options.values())
    )
    return min((mix for mix in mixes if mix[1] <= max_bytes), default=None)


def size_of(options, kinds):
    return sum(options[role][kind].size_bytes for role, kind in zip(options, kinds, strict=True))


def cost_of(options, chosen):
    return sum(options[role][kind].cost for role, kind in chosen.items())


@pytest.mark.parametrize("seed", range(40))
def test_the_search_finds_what_trying_every_combination_finds_at_every_budget(seed):
    options = made_up(seed)
    smallest = sum(min(types.values()).size_bytes for types in options.values())
    costs = []
    for limit in range(smallest, smallest + 120, 3):
        chosen = best_mix(options, limit)
        assert list(chosen) == list(options)
        costs.append(cost_of(options, chosen))
        assert (costs[-1], size_of(options, chosen.values())) == brute_force(options, limit)
    assert costs == sorted(costs, reverse=True)  # a looser budget never costs more


def test_a_role_that_gains_nothing_from_a_larger_type_gets_the_smaller():
    same = {"Q2_K": Option(10, 0.5), "Q8_0": Option(30, 0.5)}
    better = {"Q2_K": Option(10, 0.5), "Q8_0": Option(30, 0.1)}
    assert best_mix({"ffn_up": same, "ffn_down": better}, 1000) == {"ffn_up": "Q2_K", "ffn_down": "Q8_0"}


def test_a_role_that_is_worse_in_a_larger_type_gets_the_smaller():
    assert best_mix({"ffn_up": {"Q6_K": Option(10, 0.1), "Q8_0": Option(30, 0.2)}}, 1000) == {"ffn_up": "Q6_K"}


def forecast(**types):
    tensors = {"token_embd.weight": (256, 100), "blk.0.ffn_up.weight": (256, 64), "output_norm.weight": (256,)}
    kinds = {name: types.get(name.split(".")[-2], "F32") for name in tensors}
    return Forecast(100_000, kinds, (), tensors)


def test_pruned_matrices_get_no_type_that_loses_zeros_where_they_must_stay():
    roles = roles_of(forecast(token_embd="Q6_K", ffn_up="Q2_K"), keep_zeros=True)
    assert roles["ffn_up"].types == ("Q2_K", "Q3_K", "Q6_K", "Q8_0")
    assert roles["token_embd"].types == TYPES
    assert roles_of(forecast(token_embd="Q6_K", ffn_up="Q2_K"))["ffn_up"].types == TYPES


def test_only_what_llama_quantize_quantizes_is_chosen():
    assert list(roles_of(forecast(ffn_up="Q2_K", token_embd="F16"))) == ["ffn_up"]


def test_without_a_budget_a_forecast_stays_as_it_is():
    whole = forecast(token_embd="Q6_K", ffn_up="Q2_K")
    assert least(whole, "toy-Q2_K.gguf", 0) is whole


def test_a_file_with_no_types_to_choose_is_held_to_the_budget_too():
    whole = forecast(token_embd="F16", ffn_up="F16")
    assert least(whole, "toy-F16.gguf", 100_000) == whole
    with pytest.raises(ConfigError, match=r"toy-F16\.gguf will have 100,000 bytes and no types to choose.*99,999;"):
        least(whole, "toy-F16.gguf", 99_999)


def test_a_fallback_that_no_chosen_type_leaves_is_not_held_against_a_budget():
    fallbacks = tuple(Fallback(name, 96, 256, "Q2_K", "Q4_0") for name in ("blk.0.ffn_up.weight", "other.weight"))
    found = Forecast(9000, {"blk.0.ffn_up.weight": "Q4_0"}, fallbacks, {"blk.0.ffn_up.weight": (96, 64)})
    assert [fallback.tensor for fallback in smallest_of(found).fallbacks] == ["other.weight"]


def test_a_plan_gives_the_budget_as_the_size_of_a_file_whose_types_are_still_to_be_chosen():
    whole = forecast(token_embd="Q6_K", ffn_up="Q2_K")
    assert output_size(whole, None) == "100.0 kB"
    assert output_size(whole, 60_000).startswith("at most 60.0 kB")


def f16_of(checkpoint, tools, folder):
    path = folder / "toy-F16.gguf"
    convert(checkpoint, tools, "toy", path)
    return GgufFile(path, sha256_of(path), path.stat().st_size, "F16")


@pytest.fixture(scope="module")
def f16(small_base, small_tools, tmp_path_factory):
    return f16_of(small_base, small_tools, tmp_path_factory.mktemp("f16"))


def quantized(f16, checkpoint, tools, out, **settings):
    calibration = calibration_in(out, SEQUENCES)
    model = Checkpoint(checkpoint, "0" * 64)
    cfg = QuantizeConfig(**settings)
    return quantize(
        f16, model, model, calibration, cfg, keep_zeros=False, tools=tools, device="cpu", name="toy", out=out
    ).files


def size_with(f16, tools, types, importance=True):
    """Of the file with each role's type, as llama-quantize foretells it."""
    contents = GgufContents(f16.path)
    chosen = {name: types[role] for name in contents.tensors for role in types if f"{role}.weight" in name}
    return foretell(contents, "Q2_K", tools, Choice(importance, chosen)).size_bytes


@pytest.fixture(scope="module")
def chosen(f16, small_base, small_tools, tmp_path_factory):
    """A file under a budget that is a little more than what Q4_K everywhere takes, with the budget."""
    limit = size_with(f16, small_tools, dict.fromkeys(ROLES, "Q4_K")) + SPARE
    out = tmp_path_factory.mktemp("chosen")
    settings = {"types": ("Q2_K", "F16"), "max_bytes": limit, "encoder": "llama.cpp"}
    with pytest.raises(ConfigError, match=r"toy-F16\.gguf will have"):
        quantized(f16, small_base, small_tools, out, **settings)
    (file,) = quantized(f16, small_base, small_tools, out, **settings | {"types": ("Q2_K",)})
    return file, limit


def test_the_file_of_a_budget_has_the_best_measured_mix_that_fits(f16, chosen, small_tools):
    file, limit = chosen
    assert (file.type, file.path.name) == ("Q2_K", "toy-Q2_K.gguf")
    budget = file.facts["budget"]
    assert (budget["max_bytes"], budget["tokens"]) == (limit, 12)
    assert {role: [*kl] for role, kl in budget["kl"].items()} == {role: [*TYPES] for role in ROLES}
    stored = {role: [*types.items()] for role, types in file.facts["matrix_types"].items()}
    assert stored == {role: [(kind, 1)] for role, kind in budget["types"].items()} | {
        "token_embd": [(budget["types"]["token_embd"], 1)],
        "position_embd": [("F32", 1)],
    }
    assert file.size_bytes == size_with(f16, small_tools, budget["types"]) == file.path.stat().st_size <= limit
    summed = sum(budget["kl"][role][kind] for role, kind in budget["types"].items())
    assert budget["kl_sum"] == summed == best_by_brute_force(f16, budget, limit, small_tools)


def best_by_brute_force(f16, budget, limit, tools):
    """The least sum of the measured table among all 6^5 mixes."""
    uniform = foretell(GgufContents(f16.path), "Q8_0", tools, Choice(True))
    roles = roles_of(uniform)
    others = uniform.size_bytes - sum(role.size_as("Q8_0") for role in roles.values())
    assert others + sum(role.size_as("Q4_K") for role in roles.values()) + SPARE == limit
    sizes = {role: {kind: roles[role].size_as(kind) for kind in TYPES} for role in ROLES}
    return min(
        sum(budget["kl"][role][kind] for role, kind in zip(ROLES, kinds, strict=True))
        for kinds in itertools.product(TYPES, repeat=len(ROLES))
        if others + sum(sizes[role][kind] for role, kind in zip(ROLES, kinds, strict=True)) <= limit
    )


@pytest.mark.slow
def test_what_our_encoder_rounds_is_measured_and_shipped_as_it_rounds_it(
    f16, chosen, small_base, small_tools, tmp_path
):
    plain, limit = chosen
    (file,) = quantized(f16, small_base, small_tools, tmp_path, max_bytes=limit)
    ours, stock = (found.facts["budget"]["kl"] for found in (file, plain))
    for role, kind in itertools.product(ROLES, TYPES):
        assert (ours[role][kind] == stock[role][kind]) == (kind not in KTYPES), (role, kind)
    encoded = [role for role, kind in file.facts["budget"]["types"].items() if kind in KTYPES]
    assert encoded and file.facts["encoded_tensors"] == len(encoded)
    assert file.size_bytes <= limit


def test_too_small_a_budget_names_the_smallest_size_which_then_works(f16, small_base, small_tools, tmp_path):
    with pytest.raises(ConfigError, match=r"no mix of types makes toy-Q2_K\.gguf smaller than [\d,]+ bytes") as refused:
        quantized(f16, small_base, small_tools, tmp_path, max_bytes=1)
    assert not list(tmp_path.glob("*.gguf"))
    smallest = int(re.search(r"at least (\d+)$", str(refused.value))[1])
    assert f"smaller than {smallest:,} bytes, but quantize.max_bytes allows 1;" in str(refused.value)
    (file,) = quantized(f16, small_base, small_tools, tmp_path, max_bytes=smallest, encoder="llama.cpp")
    assert file.size_bytes == smallest
    assert file.facts["tensor_types"].keys() == {"F32", "Q2_K"}
    with pytest.raises(ConfigError, match=f"at least {smallest}"):
        quantized(f16, small_base, small_tools, tmp_path, max_bytes=smallest - 1)


def test_without_a_budget_the_types_are_the_file_types_own(f16, small_base, small_tools, tmp_path):
    (file,) = quantized(f16, small_base, small_tools, tmp_path, encoder="llama.cpp")
    assert "budget" not in file.facts
    assert file.facts["matrix_types"] == {
        "attn_output": {"Q3_K": 1},
        "attn_qkv": {"Q3_K": 1},
        "ffn_down": {"Q3_K": 1},
        "ffn_up": {"Q2_K": 1},
        "position_embd": {"F32": 1},
        "token_embd": {"Q6_K": 1},
    }


def test_rows_that_no_block_of_256_divides_are_chosen_from_types_that_fit(small_tools, tmp_path):
    """Such a file has fallbacks without a budget; with one it has none to refuse."""
    model = small_gpt2.make_model(tmp_path / "model", width=96)
    f16 = f16_of(model, small_tools, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (file,) = quantized(f16, model, small_tools, out, max_bytes=f16.size_bytes // 2, fallback="error")
    assert file.facts["fallbacks"] == []
    assert file.size_bytes == file.facts["predicted_bytes"] <= f16.size_bytes // 2
    offered = {role: list(kl) for role, kl in file.facts["budget"]["kl"].items()}
    assert offered == {role: ["Q4_0", "Q5_0", "Q8_0"] for role in ROLES}


def test_a_budget_that_nothing_fits_is_refused_before_training_with_one_forecast(
    small_base, f16, small_tools, tmp_path, monkeypatch
):
    base = Checkpoint.of(small_base, {})
    smallest = size_with(f16, small_tools, dict.fromkeys(ROLES, "Q2_K"))
    foretold = forecasts_of(small_base, ["Q2_K"], small_tools, name="toy", importance=True)
    asked = []
    monkeypatch.setattr(preflight, "forecasts_of", lambda *of, **more: asked.append(of) or foretold)

    def check(budget, **more):
        flags = {"name": "toy", "quantize.max_bytes": str(budget), "work_dir": str(tmp_path), **more}
        flags |= {"tokens.max_length": "32", "evaluate.max_new_tokens": "8"}
        check_model(base, resolve(flags, {}).config, small_tools)

    with pytest.raises(ConfigError, match=rf"toy-Q2_K\.gguf smaller than {smallest:,} bytes, .*at least {smallest}$"):
        check(smallest - 1, **{"gate.max_bytes": str(smallest), "quantize.fallback": "error"})
    assert len(asked) == 1
    check(smallest)
