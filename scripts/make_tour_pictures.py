"""Draws docs/pictures/tour/*.png by the commands of docs/tour.md: `python scripts/make_tour_pictures.py DINOV2S`.

Each `vitrail figures dinov2s.pt` line with the tour's photograph is run as it stands, and what it draws is made small.
"""

import argparse
import re
import shlex
import tempfile
from pathlib import Path

from PIL import Image

from vitrail.cli import main as vitrail

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "pictures" / "tour"
WIDTHS = {"attention": 1400, "colours": 1400, "rollout": 480, "distance": 700, "positions": 700}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, help="the weights of DINOv2-S/14 with registers")
    arguments = parser.parse_args()
    text = (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder) / "dinov2s.pt"
        link.symlink_to(arguments.weights.resolve())
        for line in re.findall(r"^vitrail (figures dinov2s\.pt docs/.*)$", text, re.MULTILINE):
            words = line.replace("dinov2s.pt", str(link)).replace("docs/", f"{ROOT}/docs/").replace("--out figures", "")
            assert vitrail([*shlex.split(words), "--out", folder]) == 0
        for name, width in WIDTHS.items():
            make_small(Path(folder) / f"{name}.png", OUT / f"{name}.png", width)


def make_small(source: Path, path: Path, width: int) -> None:
    """So many pixels wide at most, with 256 colours."""
    with Image.open(source) as picture:
        shown = picture.convert("RGBA")
    if shown.width > width:
        shown = shown.resize((width, round(shown.height * width / shown.width)), Image.Resampling.LANCZOS)
    shown.quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
