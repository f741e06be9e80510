"""`vitrail bench WHAT`: measurements of this machine."""

import importlib

from vitrail.commands.flags import parse
from vitrail.core.errors import UserError

KINDS = ("inference", "training", "data")


def run(arguments: list[str]) -> int:
    """inference and training: pictures a second beside peers; data: pictures a core prepares beside plain Pillow."""
    if not arguments or arguments[0] not in KINDS:
        found = f"{arguments[0]!r} is none" if arguments else "none was named"
        raise UserError(
            f"vitrail bench measures {', '.join(KINDS[:-1])} and {KINDS[-1]}; {found}; give vitrail bench inference "
            "--model ViT-B/16, vitrail bench training --model ViT-S/16 or vitrail bench data --data FOLDER."
        )
    kind = arguments[0]
    module = importlib.import_module(f"vitrail.commands.bench_{kind}")
    settings = parse(module.Settings, arguments[1:], f"bench {kind}", description=module.run.__doc__ or "")
    return int(module.run(settings))
