"""The walk: from quotes to a published release. Read this first."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from pipeline import __version__, base_model, curves, gates, metrics, settings
from pipeline.adapt import adapt
from pipeline.artifacts import Checkpoint, Corpus, Evaluation, Facts, GgufFile, GgufSet, Release, TokenDataset
from pipeline.base_model import obtain
from pipeline.calibrate import calibrate
from pipeline.claim import Claim
from pipeline.config import JobConfig
from pipeline.device import limit_threads
from pipeline.disk import errors_translated
from pipeline.evaluate import evaluate
from pipeline.export import export
from pipeline.extend import extend
from pipeline.fetch import fetch
from pipeline.finetune import finetune
from pipeline.finish import finish
from pipeline.inputs import content_hash, resolve
from pipeline.lease import lease_name
from pipeline.model_card import model_card, modelfile
from pipeline.preflight import Ground, check_model, preflight
from pipeline.publish import complete, find_release, is_latest, read_metrics, refuse_foreign_files
from pipeline.quantize import quantize
from pipeline.recover import recover
from pipeline.redact import redacted
from pipeline.rejection import Rejected, place_of, publish_judged, refuse_rejected
from pipeline.room import check_room, needs_of
from pipeline.settings import Resolved
from pipeline.sparsify import sparsify
from pipeline.stage import Stages
from pipeline.storage import open_store
from pipeline.team import Team
from pipeline.tokens import tokenize
from pipeline.versions import versions

log = logging.getLogger(__name__)

# These say where things lie, how they are shown and what a restart goes on from; none changes the model that comes
# out. The gates do not either, but a release is written once and its metrics hold the judgement: with other gates the
# same files are another release.
NOT_IN_RUN_ID: dict[str, Any] = {
    **dict.fromkeys(("input", "output", "work_dir", "llama_cpp", "log_format", "tensorboard"), True),
    **dict.fromkeys(("resume", "lease", "grace_seconds", "nodes"), True),
    "calibration": {"text"},
    "model": {"base", "revision"},  # a path or an id; what it holds is identified by its hash or commit
}


@dataclass(frozen=True)
class Outcome:
    release: Release
    metrics: dict[str, Any]
    published_now: bool  # False: the identical release was already there
    is_latest: bool  # False: the plainly named files there are a newer release's


@dataclass(frozen=True)
class Given:
    """What a run works on; its `run_id` is a hash of that and of the settings that matter."""

    corpus: Corpus
    text: Corpus | None  # to calibrate on too
    source: str  # the base model, by hash or commit
    run_id: str


@dataclass(frozen=True)
class Made:
    tokens: TokenDataset
    final: Checkpoint
    files: tuple[GgufSet, ...]  # as they were rounded, adapted and finished
    evaluation: Evaluation


def run(resolved: Resolved, *, retry_failed: bool = False) -> Outcome:
    with Team(resolved.config.nodes) as team, Claim(resolved.config, retry_failed=retry_failed) as claim:
        return walk(resolved, claim, team)


def walk(resolved: Resolved, claim: Claim, team: Team) -> Outcome:
    """From settings to release; a folder of the work that is removed meanwhile is the machine's error."""
    cfg = resolved.config
    disable_progress_bar()  # one for every model that is loaded; the long steps have bars of their own
    set_verbosity_error()
    limit_threads()
    ground = preflight(cfg)
    log.info("job: device %s (%s), llama.cpp %s, work_dir %s", *ground.device, ground.tools.version, cfg.work_dir)
    claim.work_folder()
    stages = Stages(cfg.work_dir, cfg.resume)
    with errors_translated(cfg.work_dir, stages.folders):
        return released(resolved, claim, stages, ground, team)


def released(resolved: Resolved, claim: Claim, stages: Stages, ground: Ground, team: Team) -> Outcome:
    cfg, tools = resolved.config, ground.tools
    refuse_foreign_files(cfg.output, plain_names(cfg))
    given = look_up(stages, cfg, tools.version)
    stages.belong_to(cfg.output, given.run_id, claim)
    for output in (cfg.output, place_of(cfg.output)):
        open_store(output).clear_up(f"runs/{given.run_id}")
    if release := find_release(cfg.output, given.run_id) or claim.run(given.run_id, tools.version):
        stages.forget()
        return already_there(release, cfg)
    refuse_rejected(cfg.output, cfg.gate, given.run_id, plain_names(cfg))

    made = make(stages, given, cfg, ground, team)
    figures = gather(resolved, given, made, stages, tools.version)
    files = lay_out(cfg, given.run_id, figures, made.files[-1], made.final)
    try:
        release = publish_judged(
            cfg.output, figures, run_id=given.run_id, name=cfg.name, files=files, confirm=claim.confirm
        )
    except Rejected:  # which is a release too
        stages.forget()
        raise
    stages.forget()
    return Outcome(release, figures.model_dump(mode="json"), published_now=True, is_latest=is_latest(release))


def look_up(stages: Stages, cfg: JobConfig, llama_cpp: str) -> Given:
    inputs = resolve(cfg.input, cfg.data)
    corpus = stages.run(fetch, inputs, cfg.data, outside=content_hash(inputs))
    source = base_model.resolve(cfg.model)
    text = calibration_text(stages, cfg)
    return Given(corpus, text, source, run_id_of(cfg, corpus, text, source, llama_cpp))


def make(stages: Stages, given: Given, cfg: JobConfig, ground: Ground, team: Team) -> Made:
    """The stages, from base model to measured files."""
    tools, device = ground
    base = stages.run(obtain, cfg.model, outside=given.source)
    check_model(base, cfg, tools)
    check_room(base, cfg, device.name)
    stages.needs = needs_of(base, cfg)
    tokens = stages.run(tokenize, given.corpus, base, cfg.tokens)
    where: dict[str, Any] = {"device": device.name, "seed": cfg.seed}
    tuned = stages.run(finetune, base, tokens, cfg.train, **where, team=team)
    team.dismiss()
    curves.show(tuned, cfg.tensorboard)
    calibration = stages.run(calibrate, tuned, tokens, given.text, cfg.calibration, cfg.tokens, **where)
    pruned = stages.run(sparsify, tuned, calibration, cfg.sparsity, **where)
    recovered = stages.run(recover, pruned, tuned, calibration, cfg.recover, **where)
    final = stages.run(extend, recovered, calibration, cfg.export, **where) if cfg.export.context else recovered
    naming: dict[str, Any] = {"tools": tools, "name": cfg.name}
    f16 = stages.run(export, final, given.corpus, tokens, cfg.export, **naming)
    kept: dict[str, Any] = {"keep_zeros": cfg.sparsity.keep_zeros, "device": device.name}
    adapts: dict[str, Any] = {"adapting": cfg.adapting}
    rounded = stages.run(quantize, f16, final, tuned, calibration, cfg.quantize, **kept, **adapts, **naming)
    quantized = stages.run(adapt, rounded, final, tuned, calibration, cfg.adapt, **where, **adapts)
    finished = stages.run(finish, quantized, final, tuned, calibration, cfg.finish, seed=cfg.seed, **kept, **adapts)
    models = (base, tuned, pruned, recovered, f16, quantized, finished)
    evaluation = stages.run(evaluate, *models, tokens, calibration, cfg.evaluate, cfg.fourbit, tools=tools, **where)
    return Made(tokens, final, (rounded, quantized, finished), evaluation)


def calibration_text(stages: Stages, cfg: JobConfig) -> Corpus | None:
    if not cfg.calibration.text:
        return None
    inputs = resolve((cfg.calibration.text,), cfg.data)
    return stages.run(fetch, inputs, cfg.data, outside=content_hash(inputs))


def plain_names(cfg: JobConfig) -> list[str]:
    """What people will find in the output folder."""
    return [*(f"{cfg.name}-{kind}.gguf" for kind in cfg.quantize.types), "metrics.json", "README.md", "Modelfile"]


def run_id_of(cfg: JobConfig, corpus: Corpus, text: Corpus | None, source: str, llama_cpp: str) -> str:
    """A hash of the settings that matter and of the inputs: the same job again is the same run."""
    matters = {
        "versions": [__version__, llama_cpp],
        "settings": cfg.model_dump(mode="json", exclude=NOT_IN_RUN_ID),
        "sources": [[source.name, source.sha256] for source in corpus.sources],
        "text": text.sha256 if text else None,
        "base": source,
    }
    return hashlib.sha256(json.dumps(matters, sort_keys=True).encode()).hexdigest()[:16]


def gather(resolved: Resolved, given: Given, made: Made, stages: Stages, llama_cpp: str) -> metrics.Metrics:
    found = made.evaluation.facts
    steps = zip(*(after.files for after in made.files), strict=True)
    ggufs = [gguf_figures(c, a.facts | b.facts | c.facts, found["speed"]) for a, b, c in steps]
    return metrics.Metrics.model_validate(
        {
            "run_id": given.run_id,
            "name": resolved.config.name,
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "settings": settings.as_table(resolved),
            "data": {
                "quotes": given.corpus.quotes,
                "sources": [redacted(asdict(source)) for source in given.corpus.sources],
                "tokens": redacted(made.tokens.facts),
            },
            "stages": redacted(metrics.stage_figures(stages.records, stages.facts)),
            "ledger": found["ledger"],
            "nf4": found["nf4"],
            "ggufs": ggufs,
            "generations": found["generations"],
            "long_context": found["long_context"],
            "gates": gates.check({**found, "ggufs": ggufs}, resolved.config.gate),
            "versions": versions(llama_cpp),
            "hardware": metrics.hardware(),
        }
    )


def gguf_figures(file: GgufFile, facts: Facts, speed: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": file.path.name,
        "type": file.type,
        "sha256": file.sha256,
        "size_bytes": file.size_bytes,
        "speed": speed[file.path.name],
        "facts": facts,
    }


def lay_out(
    cfg: JobConfig, run_id: str, figures: metrics.Metrics, finished: GgufSet, final: Checkpoint
) -> dict[str, Path]:
    """The files of the release by the names that people will see."""
    folder = cfg.work_dir / "release" / run_id
    folder.mkdir(parents=True, exist_ok=True)
    names = [file.path.name for file in finished.files]
    sampling = cfg.evaluate.sampling
    card = model_card(figures.model_dump(mode="json"), cfg.name, names, sampling)
    files = {file.path.name: file.path for file in finished.files}
    files["metrics.json"] = metrics.write(folder / "metrics.json", figures)
    files["README.md"] = folder / "README.md"
    files["Modelfile"] = folder / "Modelfile"
    files["README.md"].write_text(card, encoding="utf-8")
    files["Modelfile"].write_text(modelfile(names[0], end_token(final), sampling), encoding="utf-8")
    if cfg.publish.safetensors:
        files |= {f"safetensors/{path.name}": path for path in final.files()}
    return files


def end_token(checkpoint: Checkpoint) -> str:
    return str(json.loads((checkpoint.path / "tokenizer_config.json").read_text(encoding="utf-8"))["eos_token"])


def already_there(release: Release, cfg: JobConfig) -> Outcome:
    """The identical release stands: what a reader looks for is made whole, nothing is published twice."""
    complete(release)
    open_store(cfg.output).remove(lease_name(release.run_id))  # of a start that was killed right after publishing
    log.info("publish: release %s of these settings and inputs is already at %s", release.run_id, cfg.output)
    return Outcome(release, read_metrics(release), published_now=False, is_latest=is_latest(release))
