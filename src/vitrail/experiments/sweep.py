"""Table 4's choice of a learning rate (appendix B.1.1): each rate on most of the training pictures, compared on the rest;
then the best one on all of them, and the test pictures measured for the first and only time.

A sweep's folder holds a run's folder for each rate, one for the end, and sweep.json. What is finished is never repeated.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vitrail.core import ranks
from vitrail.core.errors import UserError
from vitrail.core.runs import FORMAT, read_json, write_json
from vitrail.core.types import Row
from vitrail.core.values import from_json
from vitrail.data.sources import subset
from vitrail.data.splits import Splits, hold_out, open_data
from vitrail.experiments.plan import change
from vitrail.experiments.recipe import FREE_ON_RESUME, Own, Recipe, flat
from vitrail.experiments.results import Result
from vitrail.experiments.run import run
from vitrail.training.pace import Outcome

RECORD = "sweep.json"
AT_THE_END = 1e6
"""Epochs between evaluations that no fine-tuning reaches: the last weights count, as in the paper."""


@dataclass(frozen=True)
class Swept:
    """tried: each rate's accuracy on the held-out pictures; None where its loss stopped being finite. rate: the chosen
    one. rows: the test pictures' measurements. interrupted: how a run was ended early, if one was."""

    folder: Path
    tried: dict[float, Row | None]
    rate: float | None = None
    rows: tuple[Row, ...] = ()
    interrupted: Outcome | None = None


def sweep(
    recipe: Recipe, rates: Sequence[float], folder: Path, command: Sequence[str], expected: float | None
) -> Swept:
    """Chooses among `rates` and trains the end. recipe: its --validation is the share that chooses, its --resume goes on
    with the sweep in `folder`. expected: as published, of the test pictures. Raises UserError on whatever a person has to
    mend: data without test pictures among it, before anything is trained."""
    share = recipe.data.validation
    splits = open_data(recipe.data.data, validation=share, seed=recipe.run.seed)
    if share and splits.validation is not None and not splits.made:
        splits = _held_out(splits, share, recipe.run.seed)
    if splits.test is None or splits.validation is None:
        lacks = "test" if splits.test is None else "held-out"
        raise UserError(
            f"--sweep chooses on held-out pictures and ends on test pictures, and {recipe.data.data} has no {lacks} ones; "
            "give data that have, or leave --sweep out."
        )
    whole = open_data(recipe.data.data, validation=0.0, seed=recipe.run.seed) if splits.made else splits
    chooses = dataclasses.replace(splits, test=None)
    ends = Splits(whole.train, None, whole.test, whole.origin, False, whole.notes)
    if recipe.run.dry_run:
        run(_part(recipe, rates[0], chooses, folder / f"rate-{rates[0]:g}"), command)
        return Swept(folder, {})
    _begin(recipe, rates, folder, command)
    tried: dict[float, Row | None] = {}
    for number, rate in enumerate(rates):
        place = folder / f"rate-{rate:g}"
        _say(f"\nsweep: rate {rate:g}, {number + 1} of {len(rates)}, on {len(splits.validation):,} held-out pictures")
        try:
            row, outcome = _done(_part(recipe, rate, chooses, place), place, command, None)
        except UserError:
            if not (place / "divergence.pt").exists():
                raise
            _say(f"sweep: rate {rate:g} is too high, its loss stopped being finite")
            tried[rate] = None
            continue
        if row is None:
            return Swept(folder, tried, interrupted=outcome)
        tried[rate] = row[0]
    good = {rate: row.value for rate, row in tried.items() if row is not None}
    if not good:
        raise UserError(
            f"--sweep: the loss of every rate ({', '.join(map(str, rates))}) stopped being finite; start lower."
        )
    best = max(good, key=lambda rate: good[rate])
    _say(f"\nsweep: rate {best:g} is best; now on all {len(ends.train):,} training pictures")
    rows, outcome = _done(_part(recipe, best, ends, folder / "final"), folder / "final", command, expected)
    swept = Swept(folder, tried, best, rows or (), None if rows else outcome)
    if rows:
        _tell(swept)
    return swept


def _held_out(splits: Splits, share: float, seed: int) -> Splits:
    """B.1.1's held-out pictures are training pictures, also where the data bring validation pictures, as Flowers do."""
    assert splits.validation is not None
    _say(
        f"sweep: the {len(splits.validation):,} validation pictures of {splits.origin} are left unused, as in the paper; "
        "--validation 0 chooses on them"
    )
    held, notes = hold_out(splits.train, share, seed)
    train, validation = (subset(splits.train, np.flatnonzero(part)) for part in (~held, held))
    return Splits(train, validation if held.any() else None, splits.test, splits.origin, True, (*splits.notes, *notes))


def _part(recipe: Recipe, rate: float, splits: Splits, place: Path) -> Recipe:
    """One run of the sweep: its rate, its pictures, its folder."""
    recipe = change(recipe, "optimiser", rate=rate)
    going_on = (place / "config.json").exists()
    every = AT_THE_END if recipe.run.evaluate_every == Recipe().run.evaluate_every else recipe.run.evaluate_every
    recipe = change(recipe, "run", out=place, resume=going_on, evaluate_every=every)
    return dataclasses.replace(recipe, own=Own(splits=splits))


def _done(
    recipe: Recipe, place: Path, command: Sequence[str], expected: float | None
) -> tuple[tuple[Row, ...] | None, Outcome | None]:
    """The run's rows, from its results where it is finished; None after an interruption."""
    if (place / "results.json").exists():
        _say(f"sweep: {place} is finished")
        return tuple(from_json(Row, row) for row in read_json(place / "results.json")["rows"]), None
    if (place / "divergence.pt").exists():
        raise UserError(f"{place} has diverged before.")
    result: Result = run(recipe, command, expected=expected)
    return result.rows or None, result.outcome


def _begin(recipe: Recipe, rates: Sequence[float], folder: Path, command: Sequence[str]) -> None:
    """A new record; or, going on, one of the same sweep."""
    path, now = folder / RECORD, {**flat(recipe), "rates": list(rates)}
    if not path.exists():
        if recipe.run.resume:
            raise UserError(f"--resume: {folder} holds no sweep to go on with; leave --resume out to start one there.")
        if ranks.local_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(path, {"format": FORMAT, "command": list(command), "settings": now, "tried": [], "rate": None})
        return
    if not recipe.run.resume:
        raise UserError(f"{folder} already holds a sweep; add --resume to go on with it, or give another --out.")
    began: dict[str, Any] = read_json(path).get("settings", {})
    for name, value in now.items():
        if name not in FREE_ON_RESUME and value != began.get(name):
            flag = name.replace("_", "-")
            raise UserError(
                f"--resume: this sweep began with --{flag} {began.get(name)!r}, not {value!r}; give what it began with."
            )


def _tell(swept: Swept) -> None:
    """The table, on the screen and in the record."""
    _say(f"\n{'rate':>8}  held-out top-1")
    for rate, row in swept.tried.items():
        chosen = "  chosen" if rate == swept.rate else ""
        found = "diverged" if row is None else f"{row.value:.2f} % [{row.low:.2f}, {row.high:.2f}] of {row.count:,}"
        _say(f"{rate:>8g}  {found}{chosen}")
    first = swept.rows[0]
    known = "" if first.expected is None else f"; expected {first.expected:.2f}"
    _say(
        f"{first.name}, measured once: {first.value:.2f} % [{first.low:.2f}, {first.high:.2f}] of {first.count:,}{known}"
    )
    _say(f"sweep's folder: {swept.folder}")
    if ranks.local_rank() == 0:
        path = swept.folder / RECORD
        tried = [{"rate": rate, "row": row and dataclasses.asdict(row)} for rate, row in swept.tried.items()]
        write_json(path, {**read_json(path), "tried": tried, "rate": swept.rate, "test": dataclasses.asdict(first)})


def _say(line: str) -> None:
    if ranks.local_rank() == 0:
        print(line, flush=True)
