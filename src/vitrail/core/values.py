"""Frozen dataclasses to JSON and back, strictly: an unknown or missing field is an error, never a guess."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


def to_json(value: Any) -> Any:
    """A frozen dataclass (nested, with tuples) as plain dicts, lists, numbers, strings and None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_json(item) for item in value]
    if isinstance(value, dict):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    return value


def from_json(kind: type[T], data: Any) -> T:
    """The inverse of `to_json` for the dataclass `kind`. Raises ValueError that names the field at fault."""
    return typing.cast(T, _read(kind, data, kind.__name__))


def _read(kind: Any, data: Any, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(data, dict):
            raise ValueError(f"{where} is {data!r}, not a table")
        hints = typing.get_type_hints(kind)
        known = {f.name: f for f in dataclasses.fields(kind)}
        for name in data:
            if name not in known:
                raise ValueError(f"{where} has an unknown entry {name!r}")
        for name, f in known.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and name not in data:
                raise ValueError(f"{where} lacks the entry {name!r}")
        return typing.cast(Any, kind)(
            **{name: _read(hints[name], item, f"{where}.{name}") for name, item in data.items()}
        )
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if data not in arguments:
            raise ValueError(f"{where} is {data!r}, not one of {', '.join(map(str, arguments))}")
        return data
    if origin in (Union, types.UnionType):
        tables = [option for option in arguments if dataclasses.is_dataclass(option)]
        if isinstance(data, dict) and tables:
            # The one that the entries' names fit best, so that what is wrong inside it is what is said.
            names = [{f.name for f in dataclasses.fields(option)} for option in tables]
            return _read(tables[max(range(len(tables)), key=lambda i: len(data.keys() & names[i]))], data, where)
        for option in arguments:
            try:
                return _read(option, data, where)
            except ValueError:
                continue
        raise ValueError(f"{where} is {data!r}, which does not fit {kind}")
    if origin is tuple and arguments[1:] == (Ellipsis,) and isinstance(data, (int, float)):
        return (_read(arguments[0], data, where),)  # one number stands for one that is alone
    if origin is tuple and isinstance(data, (list, tuple)):
        if arguments[1:] == (Ellipsis,):
            return tuple(_read(arguments[0], item, where) for item in data)
        if len(arguments) == len(data):
            return tuple(_read(option, item, where) for option, item in zip(arguments, data, strict=True))
    if origin is dict and isinstance(data, dict):
        return {key: _read(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    if kind is Any or (kind in (None, type(None)) and data is None):
        return data
    if kind is float and isinstance(data, (int, float)) and not isinstance(data, bool):
        return float(data)
    if kind is Path and isinstance(data, str):
        return Path(data)
    if kind in (int, str, bool) and type(data) is kind:
        return data
    raise ValueError(f"{where} is {data!r}, which does not fit {kind}")
