"""Every value of a job with its origin, the highest first: flag, what the platform was given for the job (SageMaker's
hyperparameters), environment, --config file, the platform's own paths, default.

Keys are the dotted paths of `JobConfig` ("train.learning_rate"); a flag is --train.learning-rate, an
environment name QUOTESMITH_TRAIN_LEARNING_RATE, a YAML key `train: {learning_rate: …}`.
"""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from pipeline.config import JobConfig
from pipeline.errors import ConfigError
from pipeline.platforms import Platform, Values
from pipeline.redact import redact, redacted

ENV_PREFIX = "QUOTESMITH_"
CONFIG_ENV = "QUOTESMITH_CONFIG"
LARGEST_FILE = 1024 * 1024  # bytes
# Kubernetes gives every pod these for a Service that is called quotesmith.
INJECTED = re.compile(r"QUOTESMITH_(SERVICE_HOST|SERVICE_PORT\w*|PORT(_\d+_\w+)?)")
Source = tuple[Mapping[str, Any], Mapping[str, str]]  # key to value, key to origin


@dataclass(frozen=True)
class Setting:
    """One setting as every door shows it."""

    key: str
    section: str  # the section's first docstring line; "Job" for the top level
    field: FieldInfo

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.key.upper().replace(".", "_")

    @property
    def is_list(self) -> bool:
        return get_origin(self.field.annotation) is tuple

    @property
    def meaning(self) -> str:
        return self.field.description or self.key.split(".")[-1].replace("_", " ").capitalize() + "."

    @property
    def values(self) -> str:
        """What may be given: the choices, or the type's name."""
        annotation = self.field.annotation
        if get_origin(annotation) is Literal:
            return "|".join(map(str, get_args(annotation)))
        if self.is_list:
            return "list"
        names = {bool: "true|false", int: "integer", float: "number"}
        return names.get(annotation, "text") if isinstance(annotation, type) else "text"


@dataclass(frozen=True)
class Resolved:
    config: JobConfig
    origins: dict[str, str]


def all_settings(model: type[BaseModel] = JobConfig, prefix: str = "") -> list[Setting]:
    """Every leaf of `JobConfig`, in the order of the file."""
    section = (model.__doc__ or "").splitlines()[0].rstrip(".")
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += all_settings(field.annotation, f"{prefix}{name}.")
        else:
            found.append(Setting(prefix + name, section, field))
    return found


def resolve(
    flags: Mapping[str, Any],
    env: Mapping[str, str],
    config_file: str | None = None,
    platform: Platform | None = None,
) -> Resolved:
    """The job's settings. Raises `ConfigError` for unknown keys, values out of range, contradictions."""
    config_file = config_file or env.get(CONFIG_ENV)
    sources = [from_flags(flags)]
    if platform:
        sources.append(from_platform(platform.orders(), platform.name))
    sources.append(from_env(env))
    if config_file:
        sources.append(from_file(config_file))
    if platform:
        places = {**platform.places(), **platform.nodes().places(platform.name)}
        sources.append(from_platform(places, platform.name))
    values: dict[str, Any] = {}
    origins = {setting.key: "default" for setting in all_settings()}
    for given, where in reversed(sources):
        values |= given
        origins |= where
    config = validated(values, origins)
    if platform:
        platform.check(config)
    return Resolved(config, origins)


def from_flags(flags: Mapping[str, Any]) -> Source:
    settings = {setting.key: setting for setting in all_settings()}
    given = {key: parse(settings[key], value) for key, value in flags.items()}
    return given, {key: f"flag {settings[key].flag}" for key in given}


def from_env(env: Mapping[str, str]) -> Source:
    by_name = {setting.env: setting for setting in all_settings()}
    ours = (name for name in env if name.startswith(ENV_PREFIX) and name != CONFIG_ENV)
    names = [name for name in ours if not INJECTED.fullmatch(name)]
    refuse_unknown(names, by_name, "environment variable")
    given = {by_name[name].key: parse(by_name[name], env[name]) for name in names}
    return given, {by_name[name].key: f"environment {name}" for name in names}


def from_platform(values: Values, name: str) -> Source:
    settings = {setting.key: setting for setting in all_settings()}
    refuse_unknown(values, settings, f"setting from {name}")
    given = {key: parse(settings[key], value) for key, (value, _) in values.items()}
    return given, {key: origin for key, (_, origin) in values.items()}


def from_file(uri: str) -> Source:
    """A YAML file, local or in a bucket: sections nest, or keys are dotted."""
    from pipeline.storage import open_store

    folder, slash, name = uri.rpartition("/")
    store = open_store(folder + slash or ".")
    found = store.stat(name)
    if found and found.size > LARGEST_FILE:
        raise ConfigError(f"{uri} has {found.size} bytes; needed a YAML file of at most {LARGEST_FILE}")
    try:
        text = store.read(name).decode()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise ConfigError(f"{uri} has aliases (*name), which settings do not need; write the values out")
        content = yaml.safe_load(text)
    except UnicodeDecodeError as e:
        raise ConfigError(f"{uri} is not UTF-8 text; needed a YAML file") from e
    except (yaml.YAMLError, RecursionError) as e:
        raise ConfigError(f"{uri} is not valid YAML: {problem_of(e)}") from e
    if content is None:
        content = {}
    if not isinstance(content, dict):
        raise ConfigError(f"{uri} holds a {type(content).__name__}; needed a mapping of setting names to values")
    flat = dict(flatten(content))
    settings = {setting.key: setting for setting in all_settings()}
    refuse_unknown(flat, settings, f"setting in {uri}")
    given = {key: parse(settings[key], value) for key, value in flat.items()}
    return given, dict.fromkeys(given, f"file {uri}")


def problem_of(error: Exception) -> str:
    """What and where; the line itself, which the error would repeat, can hold a secret."""
    if not isinstance(error, yaml.MarkedYAMLError) or not error.problem_mark:
        return " ".join(str(error).split())
    return f"{error.problem} in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"


def flatten(content: Mapping[Any, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    sections = {setting.key.rpartition(".")[0] for setting in all_settings()} - {""}
    for name, value in content.items():
        key = f"{prefix}{name}".replace("-", "_")
        if key in sections and isinstance(value, dict):
            yield from flatten(value, f"{key}.")
        else:
            yield key, value


def parse(setting: Setting, value: Any) -> Any:
    """Lists: several values, one comma-separated text, or JSON when the text starts with "["."""
    if not setting.is_list:
        return value
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as e:
            raise ConfigError(f"{setting.key} starts like a JSON list but is not one: {e}") from e
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple):
        return value
    if len(texts) == 1 and isinstance(texts[0], str):
        return parse(setting, texts[0]) if texts[0].startswith("[") else texts[0].split(",")
    return texts


def refuse_unknown(names: Iterable[str], known: Iterable[str], what: str) -> None:
    known = list(known)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else "`config` lists them all"
            raise ConfigError(f"unknown {what}: {name}; {hint}")


def validated(values: Mapping[str, Any], origins: Mapping[str, str]) -> JobConfig:
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *sections, name = key.split(".")
        here = nested
        for section in sections:
            here = here.setdefault(section, {})
        here[name] = value
    try:
        return JobConfig.model_validate(nested)
    except ValidationError as e:
        raise ConfigError("; ".join(explain(error, origins) for error in e.errors())) from e


def explain(error: Mapping[str, Any], origins: Mapping[str, str]) -> str:
    message = str(error["msg"]).removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    key = ".".join(str(part) for part in error["loc"] if isinstance(part, str))
    if key not in origins:
        return message
    return f"{key} is {error['input']!r} ({origins[key]}): {message}"


def plain(value: Any) -> Any:
    """A setting's value as JSON has it."""
    return list(value) if isinstance(value, tuple) else str(value) if not isinstance(value, JSON_TYPES) else value


JSON_TYPES = (str, int, float, bool, types.NoneType)


def value_of(config: BaseModel, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return plain(config)


def as_table(resolved: Resolved) -> list[dict[str, Any]]:
    """Every setting with value, origin and meaning, without secrets: for `config`, `plan` and metrics.json."""
    return [
        {
            "key": setting.key,
            "value": redacted(value_of(resolved.config, setting.key)),
            "origin": redact(resolved.origins[setting.key]),
            "meaning": setting.meaning,
        }
        for setting in all_settings()
    ]
