"""`vitrail models`: the sizes by name, with what each costs at a resolution; or the checkpoints that can be fetched."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Settings:
    resolution: int = 224
    """Side of the square picture in pixels; each model takes the nearest that its patch divides."""

    json: bool = False
    """Print JSON, one list, instead of a table."""

    remote: bool = False
    """List the ids of published checkpoints instead: each is what --weights takes."""


def run(settings: Settings) -> int:
    """Prints names, parameters (no head), MACs (a forward pass of one picture) and tokens; returns the exit code."""
    if settings.remote:
        return _remote(settings.json)
    from vitrail.core.errors import UserError
    from vitrail.weights import zoo

    if settings.resolution < 1:
        raise UserError(f"--resolution must be at least 1 pixel, not {settings.resolution}")
    rows: list[dict[str, Any]] = []
    for name in zoo.NAMES:
        stride = zoo.config(name).stride[0]
        side = max(round(settings.resolution / stride), 1) * stride
        config: Any = zoo.config(name, (side, side))
        # A ResNet has no heads and no MLP; its depth is counted in stages.
        sizes = {key: getattr(config, key, None) for key in ("width", "depth", "heads", "mlp")}
        costs = {"parameters": config.parameters(), "macs": config.macs(), "tokens": config.tokens()}
        rows.append({"name": name, **sizes, "resolution": side, **costs})
    if settings.json:
        print(json.dumps(rows, indent=2))
        return 0

    from rich import box
    from rich.console import Console
    from rich.table import Table

    headings = {"width": "width", "depth": "depth", "heads": "heads", "mlp": "MLP"}
    headings |= {"resolution": "pixels", "tokens": "tokens"}
    about, sides = f"about {settings.resolution}", {row["resolution"] for row in rows}
    if len(sides) == 1:
        del headings["resolution"]
        about = str(sides.pop())
    title = f"Vision Transformers and BiT ResNets at {about} pixels, headless"
    table = Table("name", title=title, box=box.SIMPLE_HEAD, padding=0, collapse_padding=True)
    for heading in (*headings.values(), "parameters", "GMACs"):
        table.add_column(heading, justify="right", min_width=len(heading) + 1)
    for row in rows:
        numbers = ["" if row[key] is None else str(row[key]) for key in headings]
        table.add_row(row["name"], *numbers, f"{row['parameters']:,}", f"{row['macs'] / 1e9:.2f}")
    Console().print(table)
    return 0


def _remote(as_json: bool) -> int:
    from vitrail.weights.own import FOLDER, OWN
    from vitrail.weights.storage import KNOWN, STORAGE

    if as_json:
        rows = [
            {"id": known.id, "url": f"{STORAGE}/{known.path}", "mebibytes": known.size, "note": known.note}
            for known in KNOWN
        ]
        own = [
            {
                "id": name,
                "url": None,
                "mebibytes": round((FOLDER / file).stat().st_size / 2**20, 1),
                "note": "comes with Vitrail",
            }
            for name, file in OWN.items()
        ]
        print(json.dumps([*own, *rows], indent=2))
        return 0
    print("Vitrail's own, which come with the package:\n")
    for name, file in OWN.items():
        print(f"  {name:<52} {(FOLDER / file).stat().st_size / 2**20:>5.1f} MiB   {(FOLDER / file).with_suffix('.md')}")
    print()
    print("Official checkpoints (google-research/vision_transformer), fetched when they are asked for:\n")
    for known in KNOWN:
        print(f"  {known.id:<52} {known.size:>5,} MiB   {known.note}")
    print(
        "\nalso: official:FOLDER/NAME for any other .npz there (augreg/, sam/, gsam/, bit_models/, big_vision/),\n"
        "hf:OWNER/NAME[@REVISION] for any ViT on the Hugging Face hub, and timm:NAME, which is hf:timm/NAME."
    )
    return 0
