"""Where a run lies, and what a continued run may change."""

import dataclasses
from pathlib import Path

from vitrail.core import ranks
from vitrail.core.errors import UserError
from vitrail.core.runs import FORMAT, RunFolder, read_json
from vitrail.experiments.recipe import FREE_ON_RESUME, Recipe, flat, with_settings


def open_folder(recipe: Recipe) -> tuple[RunFolder | None, Recipe]:
    """The run folder, held by the first process, and the recipe with its place (and, when resuming, its settings) known."""
    path, folder, problem = recipe.run.out, None, ""
    if ranks.first():
        try:
            path = recipe.run.out or _place(recipe)
            if not recipe.run.dry_run:
                folder = RunFolder(path)
                if recipe.run.resume:
                    recipe = _recall(recipe, folder)
                elif folder.started:
                    raise UserError(
                        f"--out {path} already holds a run; add --resume to go on with it, or give another folder."
                    )
        except UserError as error:
            problem = str(error)
    # A refusal must reach every process, or the others would wait for the first one for ever.
    problem, path, settings = ranks.from_first((problem, path, flat(recipe)))
    if problem:
        raise UserError(problem)
    return folder, with_settings(recipe, {**settings, "out": str(path)}, "the run folder")


def _place(recipe: Recipe) -> Path:
    """runs/DATA-MODEL, numbered where that is taken; the newest of them when resuming."""
    words = (
        recipe.data.data or "own",
        recipe.model.model or (recipe.model.weights and recipe.model.weights.stem) or "vit",
    )
    name = "-".join(
        "".join(c if c.isalnum() else "-" for c in Path(str(word)).name).strip("-") for word in words
    ).lower()
    places = [Path("runs") / (name if number == 1 else f"{name}-{number}") for number in range(1, 10_000)]
    taken = [place for place in places if (place / "config.json").exists()]
    if not recipe.run.resume:
        return next(place for place in places if place not in taken)
    if not taken:
        raise UserError(f"--resume: there is no run {places[0]} to go on with; give its folder with --out.")
    return taken[-1]


def _recall(recipe: Recipe, folder: RunFolder) -> Recipe:
    """The settings that the run began with; what is asked for now must not contradict them."""
    if not folder.started:
        raise UserError(f"--resume: {folder.path} holds no run to go on with; leave --resume out to start one there.")
    config = read_json(folder.file("config.json"))
    if not isinstance(config, dict) or "settings" not in config:
        raise UserError(f"{folder.file('config.json')} is not a Vitrail run's; give the folder of a Vitrail run.")
    if config.get("format", 0) > FORMAT:
        raise UserError(
            f"{folder.file('config.json')} has format {config['format']}, newer than this version's {FORMAT}; "
            "update vitrail."
        )
    began, default, now = config["requested"], flat(dataclasses.replace(Recipe(), own=recipe.own)), flat(recipe)
    for name, value in now.items():
        if name not in FREE_ON_RESUME and value != began.get(name) and value != default[name]:
            raise UserError(
                f"--resume: this run began with --{name.replace('_', '-')} {began.get(name)!r}, not {value!r}; give what "
                "it began with, or start a new run with another --out."
            )
    free = {name: value for name, value in now.items() if name in FREE_ON_RESUME and value != default[name]}
    return with_settings(recipe, {**config["settings"], **free}, str(folder.file("config.json")))
