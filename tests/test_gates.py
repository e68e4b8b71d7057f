import pytest

from pipeline.config import GateConfig
from pipeline.gates import GATES, check, failed, rejection, sentence

FILE = "voice-Q2_K.gguf"


def row(file, ratio=1.2, kld=0.3):
    return {"file": file, "ppl_ratio": {"value": ratio, "low": 1.0, "high": 9.0}, "kl_mean": kld, "size_bytes": 1}


def figures(*rows, size=70_700_000, stop_rate=0.5, file=FILE):
    return {
        "ledger": [row(None, 1.0, 0.0), *(rows or [row(file)])],
        "ggufs": [{"name": file, "size_bytes": size}],
        "generations": {file: {"stop_rate": stop_rate}},
    }


def judged(found, **limits):
    return [(r.gate, r.file, r.found, r.limit, r.passed) for r in check(found, GateConfig(**limits))]


def test_every_limit_of_the_settings_has_a_gate():
    assert list(GATES) == list(GateConfig.model_fields)


def test_no_gate_is_checked_unless_it_is_set():
    assert check(figures(row(FILE, 1e9, 1e9), size=10**12, stop_rate=0.0), GateConfig()) == []


@pytest.mark.parametrize(
    ("gate", "found", "passes", "fails"),
    [
        ("ppl_ratio", 1.2, (1.2, 1.3), (1.1999, 1.0)),
        ("kld", 0.3, (0.3, 2.0), (0.2999, 0.1)),
        ("max_bytes", 70_700_000, (70_700_000, 80_000_000), (70_699_999, 1)),
        ("stop_rate", 0.5, (0.5, 0.1), (0.5001, 1.0)),
    ],
)
def test_a_figure_at_its_limit_passes_and_one_beyond_it_fails(gate, found, passes, fails):
    for limit in (*passes, *fails):
        assert judged(figures(), **{gate: limit}) == [(gate, FILE, found, limit, limit in passes)]


def test_a_file_is_judged_by_its_last_row_the_one_as_it_is_shipped():
    quantized_then_finished = figures(row(FILE, 1.9), row(FILE, 1.2), row("other.gguf", 5.0))
    assert judged(quantized_then_finished, ppl_ratio=1.25) == [("ppl_ratio", FILE, 1.2, 1.25, True)]


def test_every_file_must_pass():
    one, two = figures(file="a.gguf"), figures(row("b.gguf", 1.5), file="b.gguf")
    both = {
        "ledger": one["ledger"] + two["ledger"],
        "ggufs": one["ggufs"] + two["ggufs"],
        "generations": one["generations"] | two["generations"],
    }
    assert [(r[1], r[4]) for r in judged(both, ppl_ratio=1.25)] == [("a.gguf", True), ("b.gguf", False)]


@pytest.mark.parametrize(
    ("broken", "gate", "reason"),
    [
        (figures(row(FILE, float("nan"))), "ppl_ratio", "it came out as nan"),
        (figures(row(FILE, kld=float("inf"))), "kld", "it came out as inf"),
        (figures(row(FILE, kld=None)), "kld", "it was not measured"),
        (figures(row("other.gguf")), "ppl_ratio", "it was not measured"),
        (figures(size={"value": None, "reason": "no file"}), "max_bytes", "no file"),
        ({**figures(), "generations": {}}, "stop_rate", "it was not measured"),
    ],
)
def test_a_number_that_is_none_fails_a_gate_that_is_set(broken, gate, reason):
    (result,) = check(broken, GateConfig(**{gate: 1}))
    assert not result.passed and result.found.reason == reason
    assert f"gate.{gate}: {FILE} has no such figure ({reason})" in sentence(result)


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        (
            {"ppl_ratio": 1.1},
            f"gate.ppl_ratio: {FILE} has 1.2 times the tuned model's perplexity, at most 1.1 is",
        ),
        ({"kld": 0.25}, f"gate.kld: {FILE} has a KL divergence of 0.3 nats a token from the tuned model, at most 0.25"),
        ({"max_bytes": 60_000_000}, f"gate.max_bytes: {FILE} has 70,700,000 bytes, at most 60,000,000 is allowed"),
        ({"stop_rate": 0.75}, f"gate.stop_rate: {FILE} has a stop rate of 0.5, at least 0.75 is needed"),
    ],
)
def test_a_failure_says_what_was_found_the_limit_and_a_setting_to_change(limits, said):
    (result,) = check(figures(), GateConfig(**limits))
    text = sentence(result)
    assert text.startswith(said) and text == rejection([result])
    advice = text.split("; ", 1)[1]
    assert any(setting in advice for setting in ("quantize.types", "quantize.max_bytes", "train.epochs"))


def test_many_failures_are_still_one_short_sentence():
    files = [f"a-name-of-some-length-for-a-voice-IQ{i}_XXS.gguf" for i in range(10)]
    each = [figures(file=file) for file in files]
    found = {
        "ledger": [row for one in each for row in one["ledger"]],
        "ggufs": [file for one in each for file in one["ggufs"]],
        "generations": {},
    }
    results = check(found, GateConfig(ppl_ratio=1.1, kld=0.1, max_bytes=1, stop_rate=1))
    text = rejection(results)
    assert len(failed(results)) == 40 and "36 more are in metrics.json" in text
    assert len(text) < 900 and text.count("quantize.types") == 1
