"""`vitrail demo`: the paper's claim in three minutes of two cores: what has seen many pictures learns from few.

The same model learns `sample:fashion` twice, for the same number of steps and each by the recipe that suits it: from
random weights, and from those that come with the package (weights/own). What the pixels alone give stands beside both.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vitrail.analysis.figures import compared
from vitrail.core.errors import UserError
from vitrail.core.runs import read_metrics, write_json
from vitrail.core.types import Row
from vitrail.core.values import to_json
from vitrail.evaluation.metrics import spoken
from vitrail.experiments.plan import change
from vitrail.experiments.recipe import FINETUNE, Recipe, with_settings
from vitrail.experiments.run import exit_code, run
from vitrail.training.log import duration

SCRATCH, PRETRAINED = "random weights", "pre-trained weights"
SHARED: Mapping[str, object] = {
    "data": "sample:fashion",
    "batch": 100,
    "flip": False,
    "shift": 1,
    "validation": 0.05,
    "evaluate_every": 0.5,
    "log_every": 50,
}
"""Of both runs."""
FROM_SCRATCH: Mapping[str, object] = {
    **{"model": "ViT-Micro/7", "pool": "mean", "positions": "learned", "rate": 2e-3, "weight_decay": 0.2},
    **{"betas": (0.9, 0.99), "smoothing": 0.1, "erasing": 0.25, "polyak": 0.995},
}
"""What teaches random weights most in few steps (docs/log.md)."""
FINE_TUNING: Mapping[str, object] = {"weights": "vitrail:ViT-Micro/7", "rate": 0.01, "baselines": True}
"""The paper's SGD without weight decay (Table 4), at its middle rate, which was the best of those tried."""


@dataclass(frozen=True)
class Settings:
    """Pre-trained against random weights on 10,000 pictures of clothes: both accuracies, both curves in one picture."""

    minutes: float = 2.5
    """Of training, both runs together."""
    steps: int = 0
    """Optimiser steps of each run, in place of the minutes."""
    limit: int = 0
    """Learn from this many pictures only; 0: all 10,000."""
    out: Path | None = None
    """The folder for both runs; none: a new one under runs/."""
    seed: int = 0
    """Of the head, the order, the augmentation and the random weights."""
    device: str = ""
    """cpu, cuda, cuda:1, mps; none: the fastest there is."""


def demo(asked: Settings, command: Sequence[str] = ()) -> int:
    """0, or 130 after Ctrl-C. Raises UserError on whatever a person has to mend."""
    if not asked.steps and not asked.minutes > 0:
        raise UserError(f"--minutes is {asked.minutes:g}; give more than 0.")
    place, steps = _place(asked.out), asked.steps
    rows: dict[str, tuple[Sequence[Row], float]] = {}
    for name in (SCRATCH, PRETRAINED):
        print(f"\n== {name} ==" if rows else f"== {name} ==", flush=True)
        result = run(_recipe(name, asked, place, steps), command)
        assert result.outcome is not None
        if result.outcome.interrupted is not None:
            return exit_code(result.outcome)
        # The second learns for as many steps as the first's minutes held.
        steps, rows[name] = result.outcome.total, (result.rows, result.outcome.seconds)
    return _tell(place, steps, rows)


def _recipe(name: str, asked: Settings, place: Path, steps: int) -> Recipe:
    recipe, own = (Recipe(), FROM_SCRATCH) if name == SCRATCH else (FINETUNE, FINE_TUNING)
    recipe = with_settings(recipe, {**SHARED, **own, "limit": asked.limit}, "the demo")
    # The first run has looked the pictures over for both.
    recipe = change(recipe, "own", surveyed=name != SCRATCH)
    recipe = change(recipe, "run", out=place / name.replace(" ", "-"), seed=asked.seed, device=asked.device)
    return change(recipe, "length", **({"steps": steps} if steps else {"minutes": asked.minutes / 2}))


def _tell(place: Path, steps: int, rows: Mapping[str, tuple[Sequence[Row], float]]) -> int:
    scratch, pretrained = (rows[name][0][0] for name in (SCRATCH, PRETRAINED))
    baselines = [row for row in rows[PRETRAINED][0] if "ridge" in row.name or "neighbours" in row.name]
    best = max(baselines, key=lambda row: row.value)
    seconds = sum(taken for _, taken in rows.values())
    curves = {name: read_metrics(place / name.replace(" ", "-") / "metrics.jsonl") for name in rows}
    compared(curves, {name: rows[name][0][0].value for name in rows}, (best.name, best.value), place / "curves.png")
    write_json(
        place / "results.json",
        {
            "steps": steps,
            "seconds": {name: round(taken, 1) for name, (_, taken) in rows.items()},
            "rows": {name: [to_json(row) for row in each] for name, (each, _) in rows.items()},
            "over_random_weights": round(pretrained.value - scratch.value, 2),
            "over_pixels": round(pretrained.value - best.value, 2),
        },
    )
    print(f"\nafter {steps:,} steps each, {duration(seconds)} of training in all, on the same test pictures:")
    for name, row in ((PRETRAINED, pretrained), (SCRATCH, scratch), *((row.name, row) for row in baselines)):
        print(f"  {name:<34}{spoken(row)}")
    print(
        f"pre-training is worth {pretrained.value - scratch.value:+.1f} points here, and "
        f"{pretrained.value - best.value:+.1f} over what the pixels alone give."
    )
    kept = place / PRETRAINED.replace(" ", "-")
    print(f"both curves: {place}/curves.png; the runs: {place} (a report.html in each)")
    print(f"next: {shlex.join(['vitrail', 'predict', str(kept), 'PICTURE'])}")
    return 0


def _place(out: Path | None) -> Path:
    """runs/demo, numbered where that is taken."""
    if out is not None:
        if (out / "results.json").exists():
            raise UserError(f"--out {out} already holds a demo; give another folder.")
        return out
    places = (Path("runs") / ("demo" if number == 1 else f"demo-{number}") for number in range(1, 10_000))
    return next(place for place in places if not place.exists())
