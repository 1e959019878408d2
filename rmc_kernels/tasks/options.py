"""Command line options made from dataclasses: a field is an option, and its line under "Attributes:" the help."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from enum import Enum
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer

Config = TypeVar("Config")
#: Options that are called other than their field.
NAMES = {"core": "model", "learning_rate": "lr", "updates": "steps", "stories": "data"}


def option_name(field: str) -> str:
    """The option, without its dashes, that sets a field."""
    return NAMES.get(field, field).replace("_", "-")


def with_options(function: Callable[..., None], *configs: type) -> Callable[..., None]:
    """`function` for typer, with an option for every field of `configs`.

    The fields that were given arrive as the keyword argument `given`; the function's other parameters stay its own.
    """
    own = [p for p in inspect.signature(function, eval_str=True).parameters.values() if p.name != "given"]
    made = [parameter for config in configs for parameter in _parameters(config)]
    names = [parameter.name for parameter in made]

    def command(**values: Any) -> None:
        given = {name: values.pop(name) for name in names}
        given = {name: value.value if isinstance(value, Enum) else value for name, value in given.items()}
        function(given={name: value for name, value in given.items() if value is not None}, **values)

    parameters = [p.replace(kind=p.KEYWORD_ONLY) for p in [*made, *own]]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def changed(config: Config, given: Mapping[str, Any]) -> Config:
    """`config` with those of the given fields that it has."""
    own = {field.name for field in fields(config)}  # type: ignore[arg-type]
    return replace(config, **{name: value for name, value in given.items() if name in own})  # type: ignore[type-var]


def _parameters(config: type) -> list[inspect.Parameter]:
    hints, helps = get_type_hints(config), _helps(config)
    return [_parameter(field.name, hints[field.name], helps.get(field.name, "")) for field in fields(config)]


def _parameter(name: str, hint: Any, help_: str) -> inspect.Parameter:
    if type(None) in get_args(hint):
        hint = next(part for part in get_args(hint) if part is not type(None))
    if get_origin(hint) is Literal:
        hint = _choices(name, get_args(hint))
    option = typer.Option(f"--{option_name(name)}", help=help_, show_default=False)
    annotation = Annotated[hint | None, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _choices(name: str, choices: tuple[str, ...]) -> type[Enum]:
    return Enum(name, {choice: choice for choice in choices})  # type: ignore[return-value]


def _helps(config: type) -> dict[str, str]:
    """The lines under "Attributes:" of a docstring, by field."""
    text = inspect.getdoc(config) or ""
    _, _, listed = text.partition("Attributes:\n")
    listed = listed.split("\n\n")[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8,}.*)*)", listed, re.MULTILINE)
    return {name: " ".join(line.split()) for name, line in found}
