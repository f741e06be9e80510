"""Flags to settings, by tyro; every mistake comes back as one sentence in place of its boxes."""

import contextlib
import dataclasses
import difflib
import io
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tyro

from vitrail.core.errors import UserError

T = TypeVar("T")


def parse(kind: type[T], arguments: Sequence[str], verb: str, default: T | None = None, description: str = "") -> T:
    """The settings that `arguments` ask for, on top of `default`.

    kind: a frozen dataclass, possibly of frozen dataclasses; every field is one flat flag. Raises UserError on a flag that
    is not known (naming the nearest), a value that does not fit, a missing one. `--help` prints and ends the process.
    """
    known = set(_flags(kind))
    for argument in arguments:
        flag = argument.split("=")[0]
        if flag.startswith("--") and flag != "--" and flag not in known | {"--help"}:
            near = difflib.get_close_matches(flag, sorted(known), n=1, cutoff=0.0)
            raise UserError(f"{flag} is not a flag of vitrail {verb}; the nearest is {near[0]}.")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                kind,
                args=list(arguments),
                prog=f"vitrail {verb}",
                description=description,
                default=default if default is not None else tyro.MISSING_NONPROP,
                config=(tyro.conf.OmitArgPrefixes,),
            )
    except SystemExit as end:
        if end.code in (0, None):
            raise
        raise UserError(f"vitrail {verb}: {_sentence(said.getvalue())} (vitrail {verb} --help lists all).") from None


def given(arguments: Sequence[str]) -> frozenset[str]:
    """Names of the settings whose flags stand among arguments that `parse` has accepted."""
    flags = (argument.split("=")[0] for argument in arguments if argument.startswith("--"))
    return frozenset(flag.removeprefix("--").removeprefix("no-").replace("-", "_") for flag in flags)


def read_toml(arguments: Sequence[str]) -> tuple[list[str], dict[str, Any], str]:
    """Takes `--config FILE` out of the arguments; (the rest, the file's settings, its name)."""
    rest, settings, name = [], {}, ""
    for argument in arguments:
        rest += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    while "--config" in rest:
        place = rest.index("--config")
        if place + 1 == len(rest):
            raise UserError("--config is missing its file; give a TOML file of settings.")
        name = rest[place + 1]
        del rest[place : place + 2]
        try:
            with Path(name).open("rb") as file:
                settings.update(tomllib.load(file))
        except OSError as error:
            raise UserError(f"--config {name} cannot be read ({error.strerror}); give a TOML file.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"--config {name} is not TOML ({error}); write lines such as rate = 0.001.") from error
    return rest, {key.replace("-", "_"): value for key, value in settings.items()}, name


def _flags(kind: Any) -> Iterator[str]:
    hints, shown = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if tyro.conf.Suppress in getattr(shown[field.name], "__metadata__", ()):
            continue
        if dataclasses.is_dataclass(hint):
            yield from _flags(hint)
        else:
            name = field.name.replace("_", "-")
            yield f"--{name}"
            if hint is bool:
                yield f"--no-{name}"


def _sentence(boxed: str) -> str:
    """What tyro says in the first part of its box, on one line, in our words where its own speak of Python."""
    parts: list[list[str]] = [[]]
    for line in boxed.splitlines():
        text = line.strip("│ ")
        # Where the output is not UTF-8 the box has no sides, and a rule of hyphens under its title.
        if text.startswith(("╭", "╰", "──", "-----")):
            parts.append([])
        else:
            parts[-1] += text.split()
    said = " ".join(parts[1] if len(parts) > 1 else []).rstrip(".")
    if number := re.match(
        r"Error parsing (\S+): (invalid literal for int|could not convert string to float).*: (.*)", said
    ):
        flag, kind, value = number.groups()
        return f"{flag} {value} is not a {'whole ' if 'int' in kind else ''}number"
    if several := re.match(r"Error parsing (\S+): no type matching (.*) could be instantiated from \[(.*?)\]", said):
        flag, kinds, values = several.groups()
        return f"{flag} {values.replace(',', '')} does not fit {kinds}"
    if missing := re.match(r"Missing from .*?: (\S+) (?:[A-Z]{2,} )?(.*?) ?\(required\)", said):
        return f"{missing[1]} is missing: {missing[2].rstrip('.')}"
    if spare := re.match(r"Unrecognized options: (.*)", said):
        return f"nothing takes {spare[1]}; leave it out, or give it after its flag, in quotes where it has spaces"
    return said or "the arguments could not be read"
