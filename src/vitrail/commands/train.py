"""`vitrail train`, `vitrail finetune` and `vitrail run`: ways to a recipe, one way to carry it out."""

import dataclasses
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vitrail.commands.flags import given, parse, read_toml
from vitrail.core.errors import UserError
from vitrail.experiments.plan import change
from vitrail.experiments.recipe import FINETUNE, Recipe, with_settings
from vitrail.experiments.run import exit_code, run

CONFIG = (
    "--config FILE.toml sets any of these by name; flags win over it. --augreg LEVEL sets mixup and RandAugment to one of "
    "AugReg's levels (none, light1, light2, medium1, medium2, strong1, strong2). 'planned' is filled in from the data."
)
NAMED = "NAME is a recipe of the paper (vitrail recipes lists them) or a Python file that defines `recipe`. "
SWEEP = (
    "--sweep chooses the rate as the paper does: on held-out pictures, then trains on all of them. --data cifar10=PATH, "
    "say, takes the paper's data in their owners' files, plain --data PATH any other pictures. "
)


def train(arguments: list[str]) -> int:
    """Trains a model from random weights on --data."""
    return _carry_out(_settings("train", arguments, Recipe()))


def finetune(arguments: list[str]) -> int:
    """Trains a model on --data from the weights of --weights, with a new head."""
    recipe = _settings("finetune", arguments, FINETUNE)
    if recipe.model.weights is None:
        recipe = change(recipe, "model", weights=Path(_usual_weights()))
    return _carry_out(recipe)


def run_file(arguments: list[str]) -> int:
    """Carries out a recipe of the paper, or of a Python file; flags change its settings."""
    if arguments and arguments[0] in ("-h", "--help"):
        parse(Recipe, ["--help"], "run NAME", Recipe(), NAMED + SWEEP + CONFIG)
    if not arguments or arguments[0].startswith("-"):
        raise UserError(
            "vitrail run needs the name of a recipe (vitrail recipes lists them) or a Python file that defines `recipe`; "
            "give it first, then flags."
        )
    name, rest = arguments[0], [argument for argument in arguments[1:] if argument != "--sweep"]
    swept = len(rest) < len(arguments) - 1
    if not name.endswith(".py") and not Path(name).is_file():
        from vitrail.experiments.paper_names import cell
        from vitrail.experiments.paper_run import carry_out

        named = cell(name)
        recipe = _settings(f"run {named.name}", rest, named.recipe, SWEEP)
        return carry_out(named, recipe, swept, ["vitrail", *sys.argv[1:]])
    if swept:
        raise UserError("--sweep is for the recipes of Table 4 (vitrail recipes finetune lists them); leave it out.")
    return _carry_out(_settings("run", rest, read_recipe(name)))


def _settings(verb: str, arguments: Sequence[str], recipe: Recipe, more: str = "") -> Recipe:
    """The recipe with what --config, --augreg and the flags change in it, in this order."""
    rest, settings, name = read_toml(arguments)
    rest, level = _level(rest)
    recipe, asked = with_settings(recipe, settings, f"--config {name}"), given(rest)
    if level is not None:
        from vitrail.experiments.paper import augreg

        recipe, asked = augreg(recipe, level), asked | {"mixup", "randaugment"}
    return dataclasses.replace(parse(Recipe, rest, verb, recipe, more + CONFIG), given=recipe.given | asked)


def _level(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """Takes `--augreg LEVEL` out of the arguments."""
    rest: list[str] = []
    for argument in arguments:
        rest += argument.split("=", 1) if argument.startswith("--augreg=") else [argument]
    if "--augreg" not in rest:
        return rest, None
    place = rest.index("--augreg")
    level = rest[place + 1] if place + 1 < len(rest) else ""
    return rest[:place] + rest[place + 2 :], level


def _carry_out(recipe: Recipe) -> int:
    return exit_code(run(recipe, ["vitrail", *sys.argv[1:]]).outcome)


def _usual_weights() -> str:
    """Says which published checkpoint is taken, and why."""
    gpu = torch.cuda.is_available()
    name, model, why = ("B_16", "ViT-B/16", "a GPU") if gpu else ("S_16", "ViT-S/16", "a machine without a GPU")
    print(
        f"planned: --weights official:augreg/{name}, AugReg's {model} of ImageNet-21k: it transfers best of those that "
        f"{why} trains in minutes; where there is no network, give a checkpoint of your own with --weights."
    )
    return f"official:augreg/{name}"


def read_recipe(path: str) -> Recipe:
    """The `recipe` of a Python file. The file becomes an importable module, so that data workers find its classes."""
    file = Path(path)
    if not file.is_file() or file.suffix != ".py":
        raise UserError(f"{path} is not a Python file that is there; give one that defines `recipe`.")
    sys.path.insert(0, str(file.resolve().parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    recipe = getattr(module, "recipe", None)
    if not isinstance(recipe, Recipe):
        raise UserError(f"{path} defines no `recipe`; end it with recipe = Recipe(...) of vitrail.experiments.recipe.")
    return recipe
