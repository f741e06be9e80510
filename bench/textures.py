"""Is texture gone where it is called removed, and are the edges there? `python bench/textures.py DATA` (32 px: 10 minutes).

For each alteration named: how many pictures a classifier of small windows recognises that learned from pictures altered in
the same way, with its 95 % interval, and how far edge energies correlate with the original's. The claim is of "outlines":
chance lies in the interval, and the correlation is at least 0.9; the exit code is 1 if one of them is not so for a seed.
A seed draws the pictures, the noise and the classifier.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

import measure
import numpy as np
import torch

from vitrail.analysis import robustness, textures
from vitrail.analysis.robustness_tests import shape_steps, texture_steps
from vitrail.core.types import Preprocess, Source
from vitrail.data import splits
from vitrail.data.sources import limit
from vitrail.data.transforms import read

LEAST = 0.9


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="pictures with a training and a test split, as --data takes them")
    parser.add_argument("--only", nargs="+", default=["outlines", "restyled"], help="alterations")
    parser.add_argument("--learn", type=int, default=3000, help="training pictures")
    parser.add_argument("--limit", type=int, default=4000, help="test pictures")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    asked = parser.parse_args()
    found, _ = splits.read(asked.data)
    runs = []
    for seed in asked.seeds:
        test, truth = taken(limit(found["test"], asked.limit, seed), asked.side)
        learn, labels = taken(limit(found["train"], asked.learn, seed), asked.side)
        chance = 100 * float(truth.bincount().max()) / len(truth)
        steps = {step.label: step for step in (*texture_steps(seed), *shape_steps(seed))}
        for name in asked.only:
            altered = textures.in_parts(steps[name].change, test)
            lessons = textures.in_parts(steps[name].change, learn, first=len(test))
            local = textures.LocalClassifier(lessons, labels, len(found["train"].classes), seed=seed)
            row = robustness.row(name, local.right(altered, truth))
            pairs = zip(test.split(64), altered.split(64), strict=True)
            edges = float(np.nanmean(np.concatenate([textures.edge_correlation(*pair) for pair in pairs])))
            print(
                f"{name}, seed {seed}: {row.value:.2f} % [{row.low:.2f}, {row.high:.2f}] of {row.count}; edges {edges:.3f}"
            )
            holds = row.low <= chance <= row.high and edges >= LEAST
            runs.append({"seed": seed, "chance": chance, "local": asdict(row), "edges": edges, "holds": holds})
    measure.write("textures", {"learned from": asked.learn, "window": local.window, "runs": runs}, asked.out)
    return int(not all(run["holds"] for run in runs if run["local"]["name"] == "outlines"))


def taken(source: Source, side: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels of side x side and their labels."""
    preprocess = Preprocess(size=(side, side), resize=(side, side))
    pixels = read([source[place].picture for place in range(len(source))], preprocess)
    return pixels, torch.from_numpy(np.asarray(source.labels)).long()


if __name__ == "__main__":
    raise SystemExit(main())
