"""Where a run lies, and what a continued run may change."""

from pathlib import Path
from typing import Any

from vitrail.core import ranks
from vitrail.core.errors import UserError
from vitrail.core.runs import FORMAT, RunFolder, read_json
from vitrail.experiments.recipe import FREE_ON_RESUME, Recipe, flat, with_settings


def open_folder(recipe: Recipe) -> tuple[RunFolder | None, Recipe]:
    """The run folder, held by the first process, and the recipe with its place (and, when resuming, its settings) known."""
    folder: RunFolder | None = None

    def find() -> dict[str, Any]:
        nonlocal folder
        path, settings = recipe.run.out or _place(recipe), flat(recipe)
        if recipe.run.resume and not (path / "config.json").exists():
            raise UserError(f"--resume: {path} holds no run to go on with; leave --resume out to start one there.")
        if not recipe.run.dry_run or recipe.run.resume:
            folder = RunFolder(path)
            if recipe.run.resume:
                settings = flat(_recall(recipe, folder))
            elif folder.started:
                raise UserError(
                    f"--out {path} already holds a run; add --resume to go on with it, or give another folder."
                )
        return {**settings, "out": str(path)}

    try:
        settings = ranks.by_first(find)
        return folder, with_settings(recipe, settings, "the run folder")
    except UserError:
        if folder is not None:
            folder.close()
        raise


def _place(recipe: Recipe) -> Path:
    """runs/DATA-MODEL, numbered where that is taken; the newest of them when resuming."""
    words = (
        Path(recipe.data.data or "own").name,
        recipe.model.model or (recipe.model.weights and recipe.model.weights.stem) or "vit",
        *([recipe.objective.objective] if recipe.masked else []),
    )
    name = "-".join("".join(c if c.isalnum() else "-" for c in word).strip("-") for word in words).lower()
    places = [Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000)]
    taken = [place for place in places if (place / "config.json").exists()]
    if not recipe.run.resume:
        return next(place for place in places if place not in taken)
    if not taken:
        raise UserError(f"--resume: there is no run {places[0]} to go on with; give its folder with --out.")
    return taken[-1]


def _recall(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The settings that the run began with; what is asked for now must not contradict them.

    Asked for is whatever was given by name, even the default, and whatever else is not the default.
    """
    path = folder.file("config.json")
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("format"), int):
        raise UserError(f"{path} is not a Vitrail run's; give the folder of a Vitrail run.")
    if config["format"] > FORMAT:
        raise UserError(f"{path} has format {config['format']}, newer than this version's {FORMAT}; update vitrail.")
    if not all(isinstance(config.get(entry), dict) for entry in ("requested", "settings", "data")):
        raise UserError(f"{path} is damaged (its settings or data are not there); restore it from a copy.")
    began, default = config["requested"], flat(Recipe())
    asked = {name: value for name, value in flat(recipe).items() if name in recipe.given or value != default[name]}
    for name, value in asked.items():
        if name not in FREE_ON_RESUME and value != began.get(name):
            raise UserError(
                f"--resume: this run began with --{name.replace('_', '-')} {began.get(name)!r}, not {value!r}; give what "
                "it began with, or start a new run with another --out."
            )
    free = {name: value for name, value in asked.items() if name in FREE_ON_RESUME}
    return with_settings(recipe, {**config["settings"], **free}, str(path))
