from types import SimpleNamespace

from pipeline import report
from pipeline.settings import as_table, resolve


def ledger_row(stage, zeros, kind=None):
    interval = {"value": 30.0, "low": 25.0, "high": 36.0}
    return {
        "stage": stage,
        "type": kind,
        "quotes": 20,
        "tokens": 400,
        "perplexity": interval,
        "ppl_ratio": {"value": 1.0, "low": 1.0, "high": 1.0},
        "size_bytes": 70_700_000,
        "bits_per_weight": 4.43,
        "zeros": zeros,
    }


METRICS = {
    "stages": [
        *({"name": name, "seconds": seconds} for name, seconds in (("finetune", 12.3), ("sparsify", 1.5))),
        *({"name": name, "seconds": seconds} for name, seconds in (("recover", 20.5), ("export", 0.5))),
        *(
            {"name": name, "seconds": seconds}
            for name, seconds in (("quantize", 3.5), ("adapt", 1.0), ("finish", 30.5))
        ),
    ],
    "ledger": [
        ledger_row("tuned", 0.0),
        ledger_row("nf4", {"value": None, "reason": "-"}),
        ledger_row("pruned", 0.5),
        ledger_row("recovered", 0.5),
        ledger_row("F16", 0.5, "F16"),
        ledger_row("quantized", 0.01, "Q2_K"),
        ledger_row("finished", 0.02, "Q2_K"),
    ],
    "ggufs": [{"name": "voice-Q2_K.gguf"}],
    "generations": {
        "voice-Q2_K.gguf": {
            "samples": [{"prompt": p, "seed": s, "text": f"{p} said {s}"} for p in ("I", "My", "The") for s in (1, 2)]
        }
    },
    "gates": [],
}


def outcome(now, latest=True, **more):
    return SimpleNamespace(
        metrics={**METRICS, **more},
        published_now=now,
        is_latest=latest,
        release=SimpleNamespace(
            uri="out/runs/abc123", output="out", files=[SimpleNamespace(name="voice-Q2_K.gguf", sha256="5f")]
        ),
    )


def test_the_run_ends_with_the_ledger_three_quotes_and_where_the_files_lie():
    text = report.of_run(outcome(True))
    row = next(line for line in text.splitlines() if line.startswith("quantized Q2_K"))
    assert [part in row for part in ("4.5", "30.0 (25.0 to 36.0)", "70.7 MB", "4.43", "0.010")] == [True] * 5
    assert [line.strip() for line in text.splitlines() if "“" in line] == ["“I said 1”", "“My said 1”", "“The said 1”"]
    assert "published: out/runs/abc123" in text and "out/voice-Q2_K.gguf" in text


def test_each_step_of_compression_has_its_row_with_the_time_that_it_took():
    lines = report.of_run(outcome(True)).splitlines()
    starts = {"tuned": "12.3", "nf4": "-", "pruned": "1.5", "recovered": "20.5", "F16": "0.5"}
    starts |= {"quantized Q2_K": "4.5", "finished Q2_K": "30.5"}
    first = next(i for i, line in enumerate(lines) if line.startswith("tuned"))
    for line, (name, seconds) in zip(lines[first : first + len(starts)], starts.items(), strict=True):
        assert line.startswith(f"{name}  ") and line.removeprefix(name).split()[0] == seconds


def test_a_release_that_was_there_is_not_called_published_now():
    assert "already published" in report.of_run(outcome(False))


def test_an_older_release_is_not_told_to_lie_under_the_plain_names():
    text = report.of_run(outcome(False, latest=False))
    assert "out/runs/abc123/objects/sha256/5f  voice-Q2_K.gguf" in text and "out/voice-Q2_K.gguf" not in text


def test_a_missing_number_is_a_dash():
    row = next(line for line in report.of_run(outcome(True)).splitlines() if line.startswith("nf4"))
    assert row.endswith("-")


def test_the_gates_that_were_set_are_named_with_what_was_found():
    passed = [("ppl_ratio", 1.125, 1.25), ("max_bytes", 70_700_000, 80_000_000)]
    rows = [
        {"gate": gate, "file": "voice-Q2_K.gguf", "found": found, "limit": limit, "passed": True}
        for gate, found, limit in passed
    ]
    lines = report.of_run(outcome(True, gates=rows)).splitlines()
    first, second = (" ".join(line.split()) for line in lines if line.startswith("gate."))
    assert first == "gate.ppl_ratio voice-Q2_K.gguf 1.125 times the tuned model's perplexity at most 1.25"
    assert second == "gate.max_bytes voice-Q2_K.gguf 70,700,000 bytes at most 80,000,000"
    assert "gate" not in report.of_run(outcome(True))


def test_sizes_are_read_in_powers_of_ten():
    assert [report.size(n) for n in (12, 70_700_000, 1.5e9)] == ["12 B", "70.7 MB", "1.50 GB"]


def test_the_settings_table_shows_empty_text_and_booleans_as_they_are_typed():
    lines = report.of_settings(as_table(resolve({}, {}))).splitlines()
    assert any(line.startswith("fourbit.enabled") and " true " in line for line in lines)
    assert any(line.startswith("model.revision") and '""' in line for line in lines)
