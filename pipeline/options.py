"""Command-line options made from the settings, so that there is one list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import click

from pipeline import platforms
from pipeline.config import SAMPLING
from pipeline.platforms import Platform
from pipeline.render import Request
from pipeline.settings import Setting, all_settings, plain

Command = TypeVar("Command", bound=Callable[..., Any])


@dataclass
class Door:
    """Where the command line was called, and the settings that its flags gave."""

    platform: Platform = field(default_factory=platforms.here)
    root: Path = Path("/")  # of the file system
    flags: dict[str, Any] = field(default_factory=dict)


def job_options(command: Command) -> Command:
    """Add --config and one option for every setting; they reach the command as `config_file` and `flags`."""
    for setting in reversed(all_settings()):
        command = option(setting)(command)
    return click.option("--config", "config_file", metavar="FILE", help="YAML file, local or in a bucket.")(command)


def sampling_options(command: Command) -> Command:
    """Add the options of `generate` that a run's own sample generations have as settings."""
    for setting in all_settings():
        section, _, name = setting.key.partition(".")
        if section == "evaluate" and name in SAMPLING:
            flag = f"--{name.replace('_', '-')}"
            default = str(setting.field.default)
            command = click.option(
                flag, default=default, metavar=setting.values, help=f"{setting.meaning} [default: {default}]"
            )(command)
    return command


def request_options(command: Command) -> Command:
    """Add the options of `render` that say what a job asks of its platform."""
    for asked in reversed(fields(Request)):
        kind = click.IntRange(0 if asked.name == "gpus" else 1) if asked.type == "int" else None
        command = click.option(
            f"--{asked.name.replace('_', '-')}",
            default=asked.default,
            type=kind,
            is_flag=asked.type == "bool",
            help=asked.metadata["help"] + (f" [default: {asked.default}]" if asked.default else ""),
        )(command)
    return command


def option(setting: Setting) -> Callable[[Command], Command]:
    default = plain(setting.field.default)
    shown = ",".join(default) if isinstance(default, list) else default
    return click.option(
        setting.flag,
        setting.key.replace(".", "__"),  # click wants a Python identifier
        multiple=setting.is_list,
        default=None,
        expose_value=False,
        callback=remember,
        metavar=setting.values,
        help=f"{setting.meaning} [default: {shown}]",
    )


def remember(context: click.Context, parameter: click.Parameter, value: Any) -> None:
    """Values stay text here; `settings.resolve` checks them, with their origin in the message."""
    if value not in (None, ()):
        key = str(parameter.name).replace("__", ".")
        context.ensure_object(Door).flags[key] = list(value) if isinstance(value, tuple) else value
