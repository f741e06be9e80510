"""`vitrail train`, `vitrail finetune` and `vitrail run`: three ways to a recipe, one way to carry it out."""

import importlib.util
import sys
from pathlib import Path

import torch

from vitrail.commands.flags import parse, read_toml
from vitrail.core.errors import UserError
from vitrail.experiments.plan import change
from vitrail.experiments.recipe import FINETUNE, Recipe, with_settings
from vitrail.experiments.run import exit_code, run

CONFIG = "--config FILE.toml sets any of these by name; flags win over it. 'planned' is filled in from the data."


def train(arguments: list[str]) -> int:
    """Trains a model from random weights on --data."""
    return _carry_out("train", arguments, Recipe())


def finetune(arguments: list[str]) -> int:
    """Trains a model on --data from the weights of --weights, with a new head."""
    return _carry_out("finetune", arguments, FINETUNE)


def run_file(arguments: list[str]) -> int:
    """Carries out the recipe of a Python file; flags change its settings."""
    if not arguments or arguments[0].startswith("-"):
        raise UserError("vitrail run needs a Python file that defines `recipe`; give its path first, then flags.")
    return _carry_out("run", arguments[1:], read_recipe(arguments[0]))


def _carry_out(verb: str, arguments: list[str], recipe: Recipe) -> int:
    rest, settings, name = read_toml(arguments)
    recipe = parse(Recipe, rest, verb, with_settings(recipe, settings, f"--config {name}"), CONFIG)
    if verb == "finetune" and recipe.model.weights is None:
        recipe = change(recipe, "model", weights=Path(_usual_weights()))
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
