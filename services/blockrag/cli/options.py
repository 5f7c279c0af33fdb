"""Options of a command from the fields of its configuration: names, types, defaults and help are said once, there.

Nothing of a configuration is built while the command line is read, and modules of configurations import no torch, so
that the client's command has the help of every other.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import typer

from blockrag.cli import console
from blockrag.modeling.files import PACKAGE_PREFIX

_NONE: Mapping[str, Any] = types.MappingProxyType({})


def command_of(
    config: type,
    *,
    left_out: Collection[str] = (),
    spellings: Mapping[str, tuple[str, ...]] = _NONE,
    given: Mapping[str, Any] = _NONE,
    last: bool = False,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Makes a command of ``run(config, …)``, whose further parameters are options too.

    Every field of the dataclass ``config`` is an option, but for those ``left_out`` and those ``given`` a value here;
    fields of a dataclass within it are options beside them. They come before ``run``'s own, or ``last``.
    ``spellings`` has other names than the field's. Paths become absolute, because workers have directories of their
    own. An error of ours ends the command with one line.
    """

    def decorate(run: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(run, eval_str=True).parameters.values())[1:]
        names = {parameter.name for parameter in own}
        hidden = {*left_out, *given, *names}
        options = _options(config, hidden, spellings)

        def command(**values: Any) -> None:
            with console.errors_to_exit():
                further = {name: values.pop(name) for name in names}
                run(_build(config, {**values, **given}), **further)

        parameters = [
            item.replace(kind=Parameter.KEYWORD_ONLY) for item in ((*own, *options) if last else (*options, *own))
        ]
        needed = [item for item in parameters if item.default is Parameter.empty]
        rest = [item for item in parameters if item.default is not Parameter.empty]
        command.__signature__ = inspect.Signature([*needed, *rest])  # type: ignore[attr-defined]
        command.__name__, command.__doc__ = run.__name__, run.__doc__
        return command

    return decorate


def _options(config: type, hidden: Collection[str], spellings: Mapping[str, tuple[str, ...]]) -> list[Parameter]:
    hints, described = get_type_hints(config, include_extras=True), _docstrings(config)
    found: list[Parameter] = []
    for item in fields(config):
        hint = hints[item.name]
        if is_dataclass(hint):
            found += _options(hint, hidden, spellings)  # type: ignore[arg-type]
        elif item.name not in hidden:
            default = _default(item)
            if get_origin(hint) is Annotated:  # an option of its own making
                found.append(Parameter(item.name, Parameter.KEYWORD_ONLY, default=default, annotation=hint))
                continue
            if get_origin(hint) is tuple and get_args(hint)[-1] is Ellipsis:
                hint = list[get_args(hint)[0]]  # type: ignore[misc]
                default = list(default) if default is not Parameter.empty else default
            name = item.name.replace("_", "-")
            usual = (f"--{name}/--no-{name}" if default is True else f"--{name}",)
            option = typer.Option(*spellings.get(item.name, usual), help=described.get(item.name, ""))
            found.append(
                Parameter(item.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option])
            )
    return found


def _default(item: Field[Any]) -> Any:
    if item.default_factory is not MISSING:
        return item.default_factory()
    return item.default if item.default is not MISSING else Parameter.empty


@cache
def _docstrings(config: type) -> dict[str, str]:
    """The text under each field, as help has it, also of fields that it inherits."""
    found: dict[str, str] = {}
    for base in reversed(config.__bases__):
        if is_dataclass(base):
            found |= _docstrings(base)
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(config))).body
    assert isinstance(body, ast.ClassDef)
    for field, below in itertools.pairwise(body.body):
        match field, below:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = " ".join(text.replace("``", "").replace("None:", "default:").split())
    return found


def _build(config: type, values: Mapping[str, Any]) -> Any:
    hints = get_type_hints(config)
    nested = {name: _build(hint, values) for name, hint in hints.items() if is_dataclass(hint)}  # type: ignore[arg-type]
    return config(
        **{item.name: _absolute(values[item.name]) for item in fields(config) if item.name in values}, **nested
    )


def _absolute(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_absolute(item) for item in value)
    if isinstance(value, Path) and not str(value).startswith(PACKAGE_PREFIX):
        return value.expanduser().absolute()
    return value
