"""``cluster/settings.reference.yaml``: every setting with its default, limits and documentation.

``python -m blockrag.settings_reference`` prints it; a test holds the file equal to what the models say.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from typing import Any, Literal, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from blockrag.settings import Settings

WIDTH = 110

HEADER = (
    "Every setting of blockrag with its default. Written by `python -m blockrag.settings_reference`; do not edit. "
    "A settings file names only what differs; an unknown key is an error. BLOCKRAG_SECTION__KEY in the environment "
    "overrides a key, its value read as YAML: BLOCKRAG_GATEWAY__MAX_INFLIGHT=16."
)

_LIMITS = {"gt": "more than {}", "ge": "at least {}", "lt": "less than {}", "le": "at most {}"}
_LIMITS |= {"min_length": "at least {} characters", "pattern": "matches {}"}


def settings_reference() -> str:
    """The whole file as text, ending in a newline; it loads to ``Settings()``."""
    lines = _comment(HEADER, "")
    for name, field in Settings.model_fields.items():
        section = field.default
        lines += ["", *_comment(_documentation(type(section)), ""), f"{name}:"]
        for key, item in type(section).model_fields.items():
            lines += _setting(key, item)
    return "\n".join(lines) + "\n"


def _setting(key: str, field: FieldInfo) -> Iterator[str]:
    yield from _comment((field.description or "") + _limits(field.annotation, field.metadata), "  ")
    item = _item_model(field.annotation)
    if item is not None:
        yield from _comment(f"Each item: {_documentation(item)}", "  ")
        yield from _parts(item, "  ")
    yield f"  {key}: {_yaml_value(field.default)}"


def _parts(model: type[BaseModel], indent: str) -> Iterator[str]:
    for name, part in model.model_fields.items():
        inner = type(part.default) if isinstance(part.default, BaseModel) else None
        documentation = f" {_documentation(inner)}" if inner else ""
        limits = _limits(part.annotation, part.metadata)
        yield from _comment(f"- {name}: {part.description}{documentation}{limits}", indent)
        if inner:
            yield from (f"{indent}#   {line.removeprefix(f'{indent}# ')}" for line in _parts(inner, indent))


def _limits(annotation: Any, metadata: list[Any]) -> str:
    """`` Allowed: ….`` or nothing when every value of the type is."""
    if get_origin(annotation) is Literal:
        found = ["one of " + ", ".join(map(str, get_args(annotation)))]
    else:
        bounds = ((text, getattr(item, name, None)) for item in metadata for name, text in _LIMITS.items())
        found = [text.format(value) for text, value in bounds if value is not None]
    return f" Allowed: {' and '.join(dict.fromkeys(found))}." if found else ""


def _item_model(annotation: Any) -> type[BaseModel] | None:
    models = [item for item in get_args(annotation) if isinstance(item, type) and issubclass(item, BaseModel)]
    return models[0] if models else None


def _documentation(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split())


def _yaml_value(value: Any) -> str:
    if isinstance(value, str):
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if isinstance(value, tuple):
        value = list(value)
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(text, WIDTH, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)


if __name__ == "__main__":
    sys.stdout.write(settings_reference())
