"""All models of a run over the same held-out quotes, the files through llama.cpp itself: the ledger."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from pipeline import ledger, llama_cpp, long_context
from pipeline.artifacts import Calibration, Checkpoint, Evaluation, GgufFile, GgufSet, TokenDataset, sha256_of
from pipeline.calibrate import load_calibration
from pipeline.config import EvaluateConfig, FourbitConfig
from pipeline.fourbit import load_nf4, nf4_facts
from pipeline.generations import Sample, describe
from pipeline.ledger import Interval, Measured, Row
from pipeline.llama_cpp import LlamaCpp
from pipeline.loading import load_fp32
from pipeline.matrices import block_matrices, weight_of
from pipeline.progress import bar
from pipeline.scoring import Reference, score, torch_logits
from pipeline.tokens import load_split

log = logging.getLogger(__name__)


def evaluate(
    base: Checkpoint,
    tuned: Checkpoint,
    pruned: Checkpoint,
    recovered: Checkpoint,
    f16: GgufFile,
    quantized: GgufSet,
    finished: GgufSet,
    tokens: TokenDataset,
    calibration: Calibration,
    cfg: EvaluateConfig,
    fourbit: FourbitConfig,
    *,
    tools: LlamaCpp,
    device: str,
    seed: int,
    out: Path,
) -> Evaluation:
    """Score base, tuned, NF4, pruned, recovered and every GGUF, quantized and finished; time the finished files under
    llama.cpp and let them write."""
    board = Scoreboard(tuned, tokens, cfg, device, seed)
    board.torch_row("base", base, load_fp32(base, device))
    board.torch_row("tuned", tuned, board.tuned_model)
    nf4 = in_four_bits(board, tuned) if fourbit.enabled else ledger.missing("fourbit.enabled is false")
    board.torch_row("pruned", pruned, load_fp32(pruned, device))
    board.torch_row("recovered", recovered, load_fp32(recovered, device))
    board.gguf_row("F16", f16, tools)
    for before, after in zip(quantized.files, finished.files, strict=True):
        if before.type != "F16":
            board.gguf_row("quantized", before, tools)
            board.gguf_row("finished", after, tools)
    result = {
        "ledger": [asdict(row) for row in board.rows],
        "nf4": nf4,
        "speed": {file.path.name: asdict(llama_cpp.bench(tools, file.path)) for file in finished.files},
        "long_context": long_context.of_files(
            tools,
            [file.path for file in finished.files],
            AutoConfig.from_pretrained(base.path).max_position_embeddings,
            f16.facts["metadata"]["context_length"],
            board.sequences,
            [ids for split in ("train", "validation") for ids in load_calibration(calibration, split)],
            bootstrap=cfg.bootstrap,
            seed=seed,
        ),
        "generations": {file.path.name: write(file, tools, tokens, cfg, seed) for file in finished.files},
    }
    path = out / "evaluation.json"
    path.write_text(json.dumps(result, ensure_ascii=False, allow_nan=False))
    return Evaluation(path, sha256_of(path), result)


def in_four_bits(board: Scoreboard, tuned: Checkpoint) -> dict[str, Any]:
    """A row of the tuned model loaded in NF4, and what it is like so."""
    model = load_nf4(tuned.path, board.device)
    facts = nf4_facts(model)
    board.nf4_row(model, facts)
    return facts


def held_out(tokens: TokenDataset, at_most: int) -> list[list[int]]:
    """Token ids of the held-out quotes; of too many, ones evenly spaced, so that every source has its share."""
    split = load_split(tokens, "holdout")
    chosen = np.linspace(0, len(split) - 1, min(at_most, len(split))).round().astype(int)
    return list(split.select(chosen)["input_ids"])


class Scoreboard:
    """The rows so far, and what all of them share: quotes, the tuned model, the bootstrap's draws."""

    def __init__(self, tuned: Checkpoint, tokens: TokenDataset, cfg: EvaluateConfig, device: str, seed: int) -> None:
        self.sequences = held_out(tokens, cfg.max_quotes)
        self.text_bytes = text_bytes(self.sequences, tuned, tokens)
        self.device = device
        self.tuned_model = load_fp32(tuned, device)
        self.reference = Reference(self.tuned_model, self.sequences)
        self.tuned_scores = score(self.reference, self.reference, self.sequences)
        self.draws = ledger.resample(len(self.sequences), cfg.bootstrap, seed)
        self.rows: list[Row] = []
        self.by_hash: dict[str, Row] = {}  # a step that changed nothing is not scored again

    def torch_row(self, stage: str, checkpoint: Checkpoint, model: PreTrainedModel) -> None:
        size = sum(path.stat().st_size for path in checkpoint.path.glob("*.safetensors"))
        bits = 8 * size / model.num_parameters()
        logits = torch_logits(model, self.sequences)
        self.add(stage, None, f"torch float32, {self.device}", logits, size, bits, zeros_of(model))

    def nf4_row(self, model: PreTrainedModel, facts: dict[str, Any]) -> None:
        size = facts["memory_bytes"]
        zeros = ledger.missing("the tuned model is not pruned; NF4 is a way of loading it, not a file")
        logits = torch_logits(model, self.sequences)
        bits = 8 * size / facts["parameters"]
        self.add("nf4", None, f"bitsandbytes NF4, {self.device}", logits, size, bits, zeros)

    def gguf_row(self, stage: str, file: GgufFile, tools: LlamaCpp) -> None:
        if before := self.by_hash.get(file.sha256):
            self.rows.append(replace(before, stage=stage))
            return
        logits = gguf_logits(tools, file.path, self.sequences)
        engine = f"llama.cpp {tools.version}, cpu"
        facts = file.facts
        self.add(stage, file, engine, logits, file.size_bytes, facts["bits_per_weight"], facts["zeros"])
        self.by_hash[file.sha256] = self.rows[-1]

    def add(
        self,
        stage: str,
        file: GgufFile | None,
        engine: str,
        logits: Iterable[Tensor],
        size: int,
        bits: float,
        zeros: Measured,
    ) -> None:
        scores = score(bar(logits, f"evaluate {stage}", len(self.sequences)), self.reference, self.sequences)
        row = Row(
            stage=stage,
            file=file.path.name if file else None,
            type=file.type if file else None,
            engine=engine,
            quotes=len(self.sequences),
            tokens=int(scores.tokens.sum()),
            perplexity=ledger.perplexity(scores, self.draws),
            bits_per_byte=ledger.bits_per_byte(scores, self.text_bytes),
            ppl_ratio=ledger.ppl_ratio(scores, self.tuned_scores, self.draws),
            kl_mean=float(scores.kl.sum() / scores.tokens.sum()),
            same_top=float(scores.same_top.sum() / scores.tokens.sum()),
            size_bytes=size,
            bits_per_weight=bits,
            zeros=zeros,
        )
        log.info("evaluate: %s: perplexity %.1f, %s", stage, row.perplexity.value, change(row.ppl_ratio))
        self.rows.append(row)


def change(ratio: Interval) -> str:
    return f"{ratio.value:.3f} times the tuned model's (95% {ratio.low:.3f} to {ratio.high:.3f})"


def gguf_logits(tools: LlamaCpp, path: Path, sequences: list[list[int]]) -> Iterator[Tensor]:
    return (torch.from_numpy(table) for table in llama_cpp.logits(tools, path, sequences))


def text_bytes(sequences: list[list[int]], tuned: Checkpoint, tokens: TokenDataset) -> int:
    """UTF-8 bytes of the scored text: a quote that was cut off counts as far as it was kept."""
    tokenizer = AutoTokenizer.from_pretrained(tuned.path)
    special = {tokens.begin_id, tokens.end_id}
    plain = [[token for token in ids if token not in special] for ids in sequences]
    return sum(len(text.encode()) for text in tokenizer.batch_decode(plain, clean_up_tokenization_spaces=False))


def zeros_of(model: PreTrainedModel) -> float:
    weights = [weight_of(module) for module in block_matrices(model).values()]
    return sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)


def write(file: GgufFile, tools: LlamaCpp, tokens: TokenDataset, cfg: EvaluateConfig, seed: int) -> dict[str, Any]:
    samples = []
    asked = [(prompt, number) for prompt in cfg.prompts for number in range(seed, seed + cfg.samples)]
    for prompt, number in bar(asked, f"generate {file.type}"):
        generation = llama_cpp.generate(tools, file.path, prompt, seed=number, **cfg.sampling)
        samples.append(Sample(prompt, number, prompt + generation.text, generation.stopped))
    return describe(samples, (row["text"] for row in load_split(tokens, "train")))
