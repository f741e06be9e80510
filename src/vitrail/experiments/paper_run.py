"""A recipe of the paper with a person's data and changes: what it lacks, in what it then differs, and its run or sweep."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from vitrail.core import ranks
from vitrail.core.errors import UserError
from vitrail.data import benchmarks
from vitrail.experiments.paper import CORPORA, RATES, TABLE_4, Cell, Task
from vitrail.experiments.paper_names import start_name
from vitrail.experiments.plan import change
from vitrail.experiments.recipe import FREE_ON_RESUME, LengthSettings, Recipe, flat
from vitrail.experiments.run import exit_code, run
from vitrail.experiments.sweep import sweep

NO_DIFFERENCE = {
    *FREE_ON_RESUME,
    *("data", "seed", "precision", "accumulate", "compile", "evaluate_every", "validation"),
    *("steps", "epochs", "minutes"),  # said apart
}
"""Settings that may differ from a recipe's and leave it the paper's."""
ALSO = {"imagenet21k": "i21k", "imagenet-21k": "i21k", "jft-300m": "jft", "imagenet2012": "imagenet"}


def carry_out(cell: Cell, recipe: Recipe, swept: bool, command: Sequence[str]) -> int:
    """Runs `cell` as `recipe` has changed it; prints expected against got. Returns the exit code; raises UserError where
    pictures or weights are missing."""
    recipe = complete(cell, recipe)
    if ranks.local_rank() == 0:
        print(f"recipe: {cell.name}, {cell.table} of the paper (vitrail recipe {cell.name} says all of it)")
        if changed := differences(cell, recipe):
            print(f"note: this run is not the paper's: {', '.join(changed)}")
    expected = cell.published[0].value if cell.published else None
    if not swept:
        return exit_code(run(recipe, command, expected=expected).outcome)
    rates = cell.source.rates if isinstance(cell.source, Task) else ()
    if len(rates) < 2:
        raise UserError(
            f"--sweep: {cell.table} gives {cell.name} one rate, {recipe.optimiser.rate:g}; leave --sweep out."
        )
    if recipe.optimiser.rate != cell.recipe.optimiser.rate:
        raise UserError(
            f"--sweep tries the rates {', '.join(f'{rate:g}' for rate in rates)}; leave --rate or --sweep out."
        )
    folder = recipe.run.out or Path("runs") / f"{cell.name}-sweep"
    return exit_code(sweep(recipe, rates, folder, command, expected).interrupted)


def complete(cell: Cell, recipe: Recipe) -> Recipe:
    """`recipe`, changed from the cell's by a person: its data found, one length where several were left, a warm-up that
    fits it. Raises UserError where pictures or weights are missing."""
    recipe = change(recipe, "data", data=_found(cell, recipe.data.data))
    if cell.task is not None and recipe.model.weights is None:
        raise UserError(_no_weights(cell))
    now, was = recipe.length, cell.recipe.length
    if now != was:
        given = {name: value for name, value in vars(now).items() if value != getattr(was, name)}
        recipe = dataclasses.replace(recipe, length=LengthSettings(**given))
        if recipe.length == LengthSettings():
            raise UserError(f"{cell.name} is left without a length; give --steps, --epochs or --minutes.")
        if recipe.schedule.warmup == cell.recipe.schedule.warmup:
            recipe = change(recipe, "schedule", warmup=-1)
    return recipe


def differences(cell: Cell, recipe: Recipe) -> list[str]:
    """In words, each setting that is not the paper's."""
    was, now = flat(cell.recipe), flat(recipe)
    names = [name for name, value in now.items() if value != was[name] and name not in NO_DIFFERENCE]
    if not cell.weights:
        names = [name for name in names if name != "weights"]
    found = [f"{name.replace('_', ' ')} {_word(now[name])} (the paper's: {_word(was[name])})" for name in names]
    return found if recipe.length == cell.recipe.length else [_length(cell, recipe), *found]


def _length(cell: Cell, recipe: Recipe) -> str:
    given, own = (
        ", ".join(f"{value:g} {name}" for name, value in dataclasses.asdict(length).items() if value)
        for length in (recipe.length, cell.recipe.length)
    )
    return f"{given} (the paper's: {own})"


def _word(value: object) -> str:
    if value == -1:
        return "planned"
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value or "none")


def _found(cell: Cell, data: str) -> str:
    """--data as data/splits.py reads it: NAME=PATH becomes NAME:PATH where NAME's owners' files are known."""
    title = cell.source.title
    known = cell.data in benchmarks.NAMES
    if not data:
        if cell.task is None and cell.start.corpus == "jft":
            raise UserError(f"{cell.name}: {title} is not public; give pictures of your own with --data FOLDER.")
        named = f"its owners' files with --data {cell.data}=PATH, or any" if known else "a"
        raise UserError(f"{cell.name} trains on {title}; give {named} folder with one folder a class with --data PATH.")
    name, equals, path = data.partition("=")
    name = ALSO.get(name.lower(), name.lower())
    if not equals or name not in {*CORPORA, *TABLE_4, *benchmarks.NAMES}:
        return data
    if name != cell.data:
        raise UserError(
            f"--data {data}: {cell.name} trains on {title}; give --data {cell.data}=PATH, or plain --data PATH."
        )
    return f"{name}:{path}" if known else path


def _no_weights(cell: Cell) -> str:
    start = cell.start
    title = f"{start.model} pre-trained on {CORPORA[start.corpus].title}"
    run = f"the run folder of vitrail run {start_name(start)}" if start in RATES else "a checkpoint of it"
    return f"{cell.name} starts from {title}, and the paper's weights are not public; give --weights {run}."
