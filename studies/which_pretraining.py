"""Labels or hidden patches: which pre-training transfers better at equal cost? About 80 minutes of one core.

    python scripts/make_pretraining_pictures.py CIFAR FASHION PICTURES
    python studies/which_pretraining.py PICTURES

The pictures that Vitrail's own weights were pre-trained on, the same model, batches, steps and augmentation: once with the
labels of their 20 classes, once by masked patch prediction. Each is then fine-tuned on the training pictures of
`sample:fashion` as the demo does it, at the three rates of the paper's Table 4 that suit so small a set, and beside them
the same model from random weights. What is measured are the 8,000 test pictures of Fashion-MNIST outside the sample.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vitrail.core.errors import UserError
from vitrail.core.values import to_json
from vitrail.experiments.recipe import FINETUNE, PRETRAIN, Recipe, with_settings
from vitrail.experiments.run import run

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import measure

SHARED: Mapping[str, Any] = {
    **{"model": "ViT-Micro/7", "size": (28,), "pool": "mean", "positions": "learned", "batch": 128, "shift": 2},
    **{"betas": (0.9, 0.99), "weight_decay": 0.1, "polyak": 0.999, "validation": 0.02, "workers": 0, "log_every": 100},
}
WAYS: Mapping[str, tuple[Recipe, Mapping[str, Any]]] = {
    "supervised": (Recipe(), {**SHARED, "rate": 2e-3, "smoothing": 0.1}),
    "masked": (PRETRAIN, {**{name: each for name, each in SHARED.items() if name != "pool"}, "rate": 1e-3}),
}
RATES = (0.003, 0.01, 0.03)
FINE_TUNING: Mapping[str, Any] = {
    **{"pool": "mean", "batch": 100, "flip": False, "shift": 1, "validation": 0.05, "workers": 0, "log_every": 100},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", type=Path, help="the folder that make_pretraining_pictures.py wrote")
    parser.add_argument("--epochs", type=float, default=4.0)
    parser.add_argument("--steps", type=int, default=475, help="of fine-tuning")
    parser.add_argument("--limit", type=int, default=0, help="pre-train on this many pictures only, to try it out")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    try:
        found = carry_out(asked)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    for line in found["fine_tuned"]:
        print(f"{line['from']}, rate {line['rate']:g}: {line['accuracy']['value']:.2f} %")
    measure.write("which_pretraining", found, asked.out)
    return 0


def carry_out(asked: argparse.Namespace) -> dict[str, Any]:
    cost, tuned = {}, []
    with tempfile.TemporaryDirectory() as name:
        for way, (recipe, settings) in WAYS.items():
            where = {"data": str(asked.pictures / "both"), "out": f"{name}/{way}", "epochs": asked.epochs}
            result = run(with_settings(recipe, {**settings, **where, "limit": asked.limit}, "the study"))
            cost[way] = {"steps": result.outcome.step, "seconds": result.outcome.seconds} if result.outcome else {}
        for way in (*WAYS, "random"):
            for rate in RATES:
                where = {"data": str(asked.pictures / "choice"), "out": f"{name}/{way}-{rate}", "steps": asked.steps}
                start = {"model": SHARED["model"], "size": SHARED["size"]} if way == "random" else {}
                start = start or {"weights": f"{name}/{way}"}
                result = run(with_settings(FINETUNE, {**FINE_TUNING, **where, **start, "rate": rate}, "the study"))
                tuned.append({"from": way, "rate": rate, "accuracy": to_json(result.rows[0])})
    settings = {way: to_json(dict(given)) for way, (_, given) in WAYS.items()}
    return {"epochs": asked.epochs, "pre_training": settings, "cost": cost, "fine_tuned": tuned}


if __name__ == "__main__":
    sys.exit(main())
