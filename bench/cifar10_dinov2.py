"""CIFAR-10 fine-tuned from the real DINOv2-S/14 by the CIFAR-10 row of Table 4, shortened to what two cores can do:

    python bench/cifar10_dinov2.py --data CIFAR10 --weights dinov2_vits14_reg4_pretrain.pth     about 15 minutes

Carries out `vitrail run finetune-vit-b16-cifar10` with 56 px (16 patches of 14), batches of 64 and 1,000 steps; further
flags go on to it (--steps, --rate, --sweep). Into results/ go the settings, each difference from the paper, the cost in
its unit, and the accuracy on the 10,000 test pictures beside what Table 5 has.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure

from vitrail.core.values import from_json
from vitrail.experiments.paper_names import cell
from vitrail.experiments.paper_run import differences
from vitrail.experiments.recipe import with_settings
from vitrail.models.classifier import ClassifierConfig

NAME = "finetune-vit-b16-i21k-cifar10"
SHORT = ["--size", "56", "--batch", "64", "--steps", "1000", "--workers", "0"]
"""No workers: 32-pixel pictures are decoded in less time than workers would take from the two cores."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CIFAR-10, as --data of vitrail takes it")
    parser.add_argument("--weights", type=Path, required=True, help="DINOv2's ViT-S/14, with registers or without")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings, flags = parser.parse_known_args()
    swept = "--sweep" in flags
    given = [*SHORT, "--data", settings.data, "--weights", str(settings.weights), *flags]
    with tempfile.TemporaryDirectory() as folder:
        out, begun = Path(folder, "run"), time.perf_counter()
        subprocess.run([sys.executable, "-m", "vitrail", "run", NAME, *given, "--out", str(out)], check=True)
        seconds = time.perf_counter() - begun
        sweep = json.loads((out / "sweep.json").read_text()) if swept else None
        last = out / "final" if swept else out
        results, config = (json.loads((last / name).read_text()) for name in ("results.json", "config.json"))
    paper = cell(NAME)
    run = with_settings(paper.recipe, config["settings"], "config.json")
    size, pictures = config["model"]["preprocess"]["size"], results["steps"] * run.data.batch
    macs = from_json(ClassifierConfig, config["model"]["config"]).backbone.macs((size[0], size[1]))
    names = {"data": Path(settings.data).name, "weights": settings.weights.name, "out": None}
    found = {
        "recipe": NAME,
        "weights_sha256": hashlib.sha256(settings.weights.read_bytes()).hexdigest(),
        "differs_from_the_paper": [
            "the start: DINOv2's ViT-S/14, self-supervised on LVD-142M, and not ViT-B/16, supervised on ImageNet-21k",
            f"a size of {size[0]} px: {(size[0] // 14) ** 2} patches, where the paper has 576",
            *(line for line in differences(paper, run) if not line.startswith(("weights", "size", "model"))),
            *([] if swept else ["the rate was not chosen by a sweep"]),
        ],
        "settings": {**config["settings"], **names},
        "pictures_seen": pictures,
        "exaflops": 6 * macs * pictures / 1e18,
        "exaflops_of_the_papers_row": paper.exaflops,
        "seconds_of_training": results["seconds"],
        "seconds_in_all": round(seconds, 1),
        "rows": results["rows"],
        "published": [known._asdict() for known in paper.published],
        "sweep": sweep and {key: sweep[key] for key in ("tried", "rate", "test")},
    }
    measure.write("cifar10_dinov2", found, settings.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
