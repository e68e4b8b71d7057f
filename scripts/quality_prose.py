"""A pretrained model compressed with GPT-2's Q2_K type map, step by step, scored on prose it was not fitted to.

SmolLM2's rows of 576 are filled with zeros to a multiple of 256, which no GGUF can hold, so everything is scored in
torch, the matrices as they decode.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import libgguf
import numpy as np
import torch
from gguf import GGMLQuantizationType
from prose import prose, windows
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, PreTrainedModel

from pipeline import heap, ledger
from pipeline.activations import fast_arithmetic, input_squares
from pipeline.artifacts import Checkpoint
from pipeline.config import SparsityConfig
from pipeline.device import arithmetic_of
from pipeline.distill import Recipe
from pipeline.encode import encode_model, padded, take_unpruned, whole_blocks
from pipeline.finish import ADAPTED_VECTOR_RATE, finish_model
from pipeline.kquants import KQuant, unpack
from pipeline.loading import load_fp32
from pipeline.matrices import block_matrices, weight_of
from pipeline.meter import Meter
from pipeline.recover import recover_model
from pipeline.sparsify import prune_model

WINDOW = 256  # tokens
FITTED = 128  # windows that pruning and encoding are fitted to: 32,768 tokens, the job's default
VALIDATION = 16  # windows that training stops by
HELD_OUT = 96  # windows scored: 24,576 tokens
DOCUMENT = "<|endoftext|>"  # what SmolLM2 and GPT-2 saw before every document in their pretraining
OURS = ("refit", "recovered", "Q2_K encoded", "adapted", "finished")
METHODS = ("random", "magnitude", "wanda", "sparsegpt")


def gpt2_type(name: str) -> str:
    """What Q2_K is for GPT-2: Q2_K where the feed-forward layer widens (in GPT-2 itself c_fc), Q3_K elsewhere in the
    blocks."""
    return "Q2_K" if name.endswith(("up_proj", "gate_proj", "c_fc")) else "Q3_K"


@dataclass(frozen=True)
class Effort:
    """How long the trainings are. Many small steps: 224 of 512 tokens close twice the loss that 56 of 2,048 do."""

    recover_steps: int = 120
    adapt_steps: int = 260
    finish_steps: int = 45
    batch_tokens: int = 512
    recover_rate: float = 2e-4
    adapt_rate: float = 2e-4
    finish_rate: float = 1e-4


class Bench:
    """The model, its text, and the rows so far. Every step's model and row are kept in `folder`, and not made again."""

    def __init__(self, model: Path, folder: Path, device: str, effort: Effort) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.device, self.effort = folder, device, effort
        self.precision = arithmetic_of("auto", device).name
        tokenizer = AutoTokenizer.from_pretrained(model)
        begin = tokenizer.convert_tokens_to_ids(DOCUMENT)
        text = prose()
        train = windows(text.calibration, tokenizer, begin, WINDOW, seed=0)
        self.validation, self.train = train[:VALIDATION], train[VALIDATION:]
        self.fitted = self.train[:FITTED]
        self.held_out = windows(text.held_out, tokenizer, begin, WINDOW, seed=1)[:HELD_OUT]
        self.draws = ledger.resample(len(self.held_out), 10_000, seed=0)
        self.rows: list[dict[str, Any]] = []
        if not (folder / "dense").exists():
            load_fp32(Checkpoint(model, ""), "cpu").save_pretrained(folder / "dense")
        self.dense = self.nats(self.load("dense"))

    def load(self, step: str) -> PreTrainedModel:
        return load_fp32(Checkpoint(self.folder / step, ""), self.device)

    @torch.inference_mode()
    def nats(self, model: PreTrainedModel) -> np.ndarray:
        """Summed over the tokens of each held-out window."""
        found = []
        for start in range(0, len(self.held_out), 8):
            ids = torch.tensor(self.held_out[start : start + 8], device=self.device)
            with fast_arithmetic(model.device):
                logits = model(ids).logits[:, :-1].float()
            found.append(cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").sum(1).cpu())
        return torch.cat(found).double().numpy()

    def step(self, name: str, start: str, change: Callable[[PreTrainedModel], dict[str, Any] | None]) -> None:
        """A row: `change`, done in place to the model of the step `start`, timed and scored."""
        kept = self.folder / f"{name}.json"
        if not kept.exists():
            model = self.load(start)
            with Meter() as meter, heap.reused():
                facts = change(model) or {}
            model.save_pretrained(self.folder / name)
            row = {"step": name, "from": start, **self.score(model), "seconds": meter.seconds, "facts": facts}
            kept.write_text(json.dumps(row | {"peak_memory_bytes": meter.peak_bytes}))
        self.rows.append(json.loads(kept.read_text()))
        ratio = self.rows[-1]["ppl_ratio"]
        click.echo(f"{name}: {ratio['value']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})", err=True)

    def score(self, model: PreTrainedModel) -> dict[str, Any]:
        nats = self.nats(model)
        tokens = np.full(len(nats), WINDOW - 1)
        weights = [weight_of(module) for module in block_matrices(model).values()]
        return {
            "perplexity": asdict(ledger.interval(nats, tokens, self.draws)),
            "ppl_ratio": asdict(ledger.interval(nats - self.dense, tokens, self.draws)),
            "zeros": sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights),
        }

    def prune(self, method: str, refit: bool = False) -> Callable[[PreTrainedModel], None]:
        return lambda model: prune_model(model, self.fitted, SparsityConfig(method=method, refit=refit), 0)

    def stock(self, importance: bool) -> Callable[[PreTrainedModel], None]:
        """llama-quantize's own rounding, by the wheel that is bit-identical to it."""

        def change(model: PreTrainedModel) -> None:
            squares = input_squares(model, self.fitted) if importance else {}
            for name, module in block_matrices(model).items():
                weight = weight_of(module)
                columns = weight.shape[1]
                wide = padded(weight, whole_blocks(columns)).cpu().contiguous()
                means = squares[name].sums / squares[name].tokens if importance else None
                given = None if means is None else padded(means[None], wide.shape[1])[0].cpu().numpy()
                kind = gpt2_type(name)
                data = libgguf.quantize_rows(wide.numpy(), int(GGMLQuantizationType[kind]), given)
                weight.copy_(unpack(data, kind).dequantize()[:, :columns])

        return change

    def encode(self, keep: str = "", kinds: Sequence[str] = ("Q2_K", "Q3_K")) -> Callable[[PreTrainedModel], None]:
        """Our encoder for the matrices of these `kinds`, its result in the file `keep`."""

        def change(model: PreTrainedModel) -> None:
            types = {name: kind for name in block_matrices(model) if (kind := gpt2_type(name)) in kinds}
            take_unpruned(model, lambda: self.load("dense"), types, keep_zeros=False)
            found = encode_model(model, self.fitted, types)
            if keep:
                self.keep(found, keep)

        return change

    def recover(self, model: PreTrainedModel) -> dict[str, Any]:
        recipe = self.recipe(self.effort.recover_steps, self.effort.recover_rate, seed=0)
        return recover_model(model, self.load("dense"), self.train, self.validation, recipe)

    def adapt(self, encoded: str, keep: str) -> Callable[[PreTrainedModel], dict[str, Any]]:
        """The matrices that are not in the file `encoded` trained beside those, and encoded after that."""

        def change(model: PreTrainedModel) -> dict[str, Any]:
            modules, kquants = block_matrices(model), self.kquants(encoded)
            adapted = {name: gpt2_type(name) for name in modules.keys() - kquants}
            for name in kquants:
                modules[name].weight.requires_grad_(False)
            recipe = self.recipe(self.effort.adapt_steps, self.effort.adapt_rate, seed=1)
            facts = recover_model(model, self.load("dense"), self.train, self.validation, recipe, what="adapt")
            with torch.no_grad():
                self.keep(kquants | encode_model(model, self.fitted, adapted), keep)
            return facts

        return change

    def finish(self, encoded: str) -> Callable[[PreTrainedModel], dict[str, Any]]:
        def change(model: PreTrainedModel) -> dict[str, Any]:
            recipe = self.recipe(self.effort.finish_steps, self.effort.finish_rate, seed=2)
            kquants = self.kquants(encoded)
            given = self.load("dense"), kquants, self.train, self.validation, recipe, ADAPTED_VECTOR_RATE
            facts = finish_model(model, *given)
            return {key: value for key, value in facts.items() if key != "kquants"}

        return change

    def recipe(self, steps: int, rate: float, seed: int) -> Recipe:
        return Recipe(steps, self.effort.batch_tokens, rate, steps, self.precision, seed)

    def keep(self, kquants: Mapping[str, KQuant], file: str) -> None:
        torch.save({name: vars(kquant) for name, kquant in kquants.items()}, self.folder / file)

    def kquants(self, file: str) -> dict[str, KQuant]:
        return {name: KQuant(**values) for name, values in torch.load(self.folder / file).items()}


def steps(bench: Bench) -> list[dict[str, Any]]:
    """All rows, in the order they are told in."""
    with torch.no_grad():
        for method in METHODS:
            bench.step(method, "dense", bench.prune(method))
        bench.step("sparsegpt, stock rounding", "sparsegpt", bench.stock(importance=False))
        bench.step("sparsegpt, stock rounding with importance matrix", "sparsegpt", bench.stock(importance=True))
        bench.step("refit", "dense", bench.prune("sparsegpt", refit=True))
        bench.step("refit, stock rounding with importance matrix", "refit", bench.stock(importance=True))
        bench.step("refit, our encoder", "refit", bench.encode())
    bench.step("recovered", "refit", bench.recover)
    with torch.no_grad():
        bench.step("recovered, stock rounding with importance matrix", "recovered", bench.stock(importance=True))
        bench.step("recovered, our encoder", "recovered", bench.encode())
        bench.step("Q2_K encoded", "recovered", bench.encode(keep="first.pt", kinds=("Q2_K",)))
    bench.step("adapted", "Q2_K encoded", bench.adapt("first.pt", keep="adapted.pt"))
    bench.step("finished", "adapted", bench.finish("adapted.pt"))
    return bench.rows


def minutes_and_losses(rows: list[dict[str, Any]]) -> list[tuple[float, str, float]]:
    """The curve: minutes that the steps of `OURS` took so far, and the validation KL by then."""
    spent = 0.0
    points = []
    for row in (row for row in rows if row["step"] in OURS):
        for point in row["facts"].get("curve", []):
            points.append(((spent + point["seconds"]) / 60, row["step"], point["validation_kl"]))
        spent += row["seconds"]
    return points
