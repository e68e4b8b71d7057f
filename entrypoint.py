"""quotesmith's command line. `pipeline/options.py` makes options of the settings; `pipeline/job.py` is the job."""

from __future__ import annotations

from pipeline import signals, terminal

if __name__ == "__main__":
    terminal.open_closed()
    signals.handle()  # before the imports below: they take a quarter of a second

import io
import json
import logging
import os
import traceback
from pathlib import Path
from signal import SIGINT, SIGTERM
from typing import Any

import click

from pipeline import __version__, groups, logs, openmp, platforms
from pipeline.disk import as_machine_error
from pipeline.errors import NotAllowed, QuotesmithError
from pipeline.foreign_text import printable
from pipeline.options import Door, job_options, request_options, sampling_options
from pipeline.platforms import Platform
from pipeline.redact import one_sentence, redact
from pipeline.render import PLATFORMS, Request, job_of
from pipeline.render import render as rendered
from pipeline.settings import Resolved, as_table, resolve
from pipeline.signals import Stopped
from pipeline.terminal import give, say

log = logging.getLogger("quotesmith")

LONGEST_ERROR = 4000  # characters
GROUP = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


class Commands(click.Group):
    """`--self-test` is the command self-test, as images spell it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, ["self-test", *args[1:]] if args[:1] == ["--self-test"] else args)


@click.group(cls=Commands, context_settings=GROUP)
@click.version_option(__version__, prog_name="quotesmith")
def cli() -> None:
    """Turn a bucket of quotes into one small GGUF model that speaks in that voice, with proof.

    Every option can also be an environment variable (--train.epochs is QUOTESMITH_TRAIN_EPOCHS) or a line in
    a YAML file given with --config.
    """


def settled(context: click.Context, config_file: str | None) -> Resolved:
    """All settings from all their places, and logging as they ask for it."""
    door = context.ensure_object(Door)
    resolved = resolve(door.flags, os.environ, config_file, door.platform)
    logs.configure(resolved.config.log_format)
    signals.state.grace_seconds = resolved.config.grace_seconds
    return resolved


@cli.command()
@job_options
@click.option("--retry-failed", is_flag=True, help="Try a run again that failed for good (its FAILURE.json goes).")
@click.pass_context
def run(context: click.Context, config_file: str | None, retry_failed: bool) -> None:
    """Run the whole job and publish the release."""
    resolved = settled(context, config_file)
    if resolved.config.nodes.rank:
        from pipeline.team.follower import follow

        with signals.unwinding():
            follow(resolved.config)
        return
    from pipeline import job, report

    with signals.unwinding():
        outcome = job.run(resolved, retry_failed=retry_failed)
    say(redact(report.of_run(outcome)))


@cli.command()
@job_options
@click.pass_context
def plan(context: click.Context, config_file: str | None) -> None:
    """Say what a run would do: settings, quotes kept and dropped, tokens, steps, sizes. Trains nothing."""
    resolved = settled(context, config_file)
    from pipeline import plan as planning
    from pipeline import report

    give(report.of_settings(as_table(resolved)))
    with signals.unwinding():
        planned = planning.plan(resolved)
    give(redact(report.of_plan(planned)))


@cli.command()
@job_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.pass_context
def config(context: click.Context, config_file: str | None, as_json: bool) -> None:
    """Print every setting with its value, where the value comes from, and what it means."""
    table = as_table(settled(context, config_file))
    from pipeline import report

    give(json.dumps(table, indent=1) if as_json else report.of_settings(table))


@cli.command("self-test")
@job_options
@click.pass_context
def self_test(context: click.Context, config_file: str | None) -> None:
    """Say whether a job can run on this machine, and if not, why. Also: --self-test."""
    cfg = settled(context, config_file).config
    from pipeline import self_test as test
    from pipeline.cuda_driver import ask

    door, parts = context.obj, list[test.Part]()
    driver = ask(door.root)
    for checks in (test.quick(cfg, door.platform, driver, os.environ, door.root), test.thorough(cfg, driver)):
        for part in checks:
            parts.append(part)
            say("\n".join(part.lines()))
        test.require_usable(parts)
    say("a job can run here")


@cli.command()
@click.argument("platform", type=click.Choice(PLATFORMS))
@request_options
@job_options
@click.pass_context
def render(context: click.Context, /, platform: str, config_file: str | None, **request: Any) -> None:
    """Print a complete job with these settings for another platform to run."""
    resolved = resolve(context.ensure_object(Door).flags, os.environ, config_file)
    give(rendered(platform, job_of(resolved, Request(**request))).removesuffix("\n"))


@cli.command()
@click.argument("gguf", type=click.Path(exists=True, dir_okay=False))
@click.option("--prompt", default="", help="How the quotes begin. [default: as the model likes]")
@click.option("--count", default=1, type=click.IntRange(1), help="How many quotes. [default: 1]")
@click.option("--seed", default=42, type=click.IntRange(0, 2**32 - 1), help="The first seed. [default: 42]")
@sampling_options
@click.option("--llama-cpp", default="", help="Folder of the llama.cpp tools.")
def generate(gguf: str, prompt: str, count: int, seed: int, llama_cpp: str, **sampling: str) -> None:
    """Let a GGUF file write quotes, through llama.cpp."""
    logs.configure("auto")
    chosen = resolve({f"evaluate.{name}": value for name, value in sampling.items()}, {}).config.evaluate
    from pathlib import Path

    from pipeline import llama_cpp as engine
    from pipeline.gguf_guard import check_from_outside

    path = Path(gguf)
    check_from_outside(path)
    tools = engine.find(llama_cpp)
    for number in range(seed, seed + count):
        give(prompt + engine.generate(tools, path, prompt, seed=number, **chosen.sampling).text)


@cli.command()
@click.argument("uri")
def verify(uri: str) -> None:
    """Check every object of a release against its manifest."""
    logs.configure("auto")
    from pipeline import publish

    with signals.unwinding():
        checked = publish.verify(uri)
    for name in checked:
        say(f"ok  {name}")
    say(f"{len(checked)} objects are as the manifest says")


cli.add_command(run, "train")  # SageMaker starts an image with the one argument `train`


def main(root: Path = Path("/")) -> None:
    """Run the command line; end with the exit code of `pipeline/errors.py`, and a traceback only for our bugs."""
    terminal.open_closed()
    signals.handle()
    prepare_environment()
    platform = platforms.find(os.environ, root)
    signals.state.note = platform.note()
    signals.leave(exit_code_of(lambda: cli(standalone_mode=False, obj=Door(platform, root=root)), platform))


def prepare_environment() -> None:
    """What libraries read from the environment while they are imported."""
    openmp.spin_briefly()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # else torch's own lines among ours, about tries to connect
    if not logs.on_terminal():
        os.environ.setdefault("TQDM_DISABLE", "1")


def exit_code_of(command: Any, platform: Platform | None = None) -> int:
    try:
        return int(command() or 0)
    except SystemExit as e:
        if not isinstance(e.__context__, BrokenPipeError):  # click ends with 1 for any, taking it for stdout's
            raise
        error: BaseException = e.__context__
    except BaseException as e:
        error = e
    groups.end_all()
    code, sentence = verdict(error)
    if platform and code:
        platforms.report(platform, one_sentence(sentence))
    return code


def verdict(error: BaseException) -> tuple[int, str]:
    """The exit code for an error, and why in a sentence, which stderr has now."""
    stop = signals.state.received  # whatever it became on its way up
    if stop or isinstance(error, KeyboardInterrupt | click.Abort | Stopped):
        stop = stop or (SIGTERM if isinstance(error, Stopped) else SIGINT)
        say(signals.sentence(stop), err=True)
        return signals.code_of(stop), signals.sentence(stop)
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code, ""
    if isinstance(error, click.ClickException):
        said = io.StringIO()
        error.show(said)
        say(redact(said.getvalue().removesuffix("\n")), err=True)
        return error.exit_code, error.format_message()
    if isinstance(error, QuotesmithError):
        return fail(error)
    if isinstance(error, PermissionError):
        return fail(NotAllowed(f"{error.filename} cannot be opened or written: {error.strerror}"))
    if machine := as_machine_error(error, getattr(error, "filename", None) or "by this process"):
        return fail(machine)
    say(redact("".join(traceback.format_exception(error))), err=True)
    return 70, f"a bug of quotesmith, whose traceback is in the log: {type(error).__name__}: {error}"


def fail(error: QuotesmithError) -> tuple[int, str]:
    """The sentence, once: as a log line when the log is JSON, else plainly. Foreign text in it obeys no terminal."""
    sentence = printable(redact(str(error)), LONGEST_ERROR)
    if logs.as_json():
        log.error("error: %s", sentence)
    else:
        say(f"error: {sentence}", err=True)
    return error.exit_code, sentence


if __name__ == "__main__":
    main()
