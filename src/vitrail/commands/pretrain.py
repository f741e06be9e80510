"""`vitrail pretrain`: learning from pictures whose labels nobody needs to know."""

import dataclasses
import sys

from vitrail.commands.flags import given, parse, read_toml
from vitrail.core.errors import UserError
from vitrail.experiments.recipe import PRETRAIN, Recipe, with_settings
from vitrail.experiments.run import exit_code, run

HELP = (
    "Learns from pictures without labels, by masked patch prediction: --data is any folder of pictures, or all that train "
    "takes. --config FILE.toml sets any of these by name; flags win over it. 'planned' is filled in from the data."
)


def pretrain(arguments: list[str]) -> int:
    """Pre-trains a backbone on --data, for `finetune --weights` and `probe`."""
    rest, settings, name = read_toml(arguments)
    recipe = with_settings(PRETRAIN, settings, f"--config {name}")
    recipe = dataclasses.replace(parse(Recipe, rest, "pretrain", recipe, HELP), given=recipe.given | given(rest))
    if not recipe.masked:
        raise UserError("--objective supervised is what vitrail train does; leave it out, or give masked-patch.")
    return exit_code(run(recipe, ["vitrail", *sys.argv[1:]]).outcome)
