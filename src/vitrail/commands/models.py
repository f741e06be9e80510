"""`vitrail models`: the sizes by name, with what each costs at a resolution."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    resolution: int = 224
    """Side of the square picture in pixels; each size takes the nearest that its patch divides."""

    json: bool = False
    """Print JSON, one list, instead of a table."""


def run(settings: Settings) -> int:
    """Prints names, parameters (no head), MACs (a forward pass of one picture) and tokens; returns the exit code."""
    from vitrail.core.errors import UserError
    from vitrail.weights import zoo

    if settings.resolution < 1:
        raise UserError(f"--resolution must be at least 1 pixel, not {settings.resolution}")
    rows: list[dict[str, Any]] = []
    for name in zoo.NAMES:
        patch = zoo.parse(name)[1][0]
        side = max(round(settings.resolution / patch), 1) * patch
        config = zoo.config(name, (side, side))
        sizes = {"name": name, "width": config.width, "depth": config.depth, "heads": config.heads, "mlp": config.mlp}
        costs = {"parameters": config.parameters(), "macs": config.macs(), "tokens": config.tokens()}
        rows.append({**sizes, "resolution": side, **costs})
    if settings.json:
        print(json.dumps(rows, indent=2))
        return 0

    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = f"Vision Transformers at {settings.resolution} pixels, headless"
    table = Table("name", title=title, box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    for heading in ("width", "depth", "heads", "MLP", "tokens", "parameters", "GMACs"):
        table.add_column(heading, justify="right", min_width=len(heading) + 1)
    for row in rows:
        numbers = [str(row[key]) for key in ("width", "depth", "heads", "mlp", "tokens")]
        table.add_row(row["name"], *numbers, f"{row['parameters']:,}", f"{row['macs'] / 1e9:.2f}")
    Console().print(table)
    return 0
