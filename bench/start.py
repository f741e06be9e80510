"""How long `vitrail predict` takes for one picture, beside what cannot be saved: `python bench/start.py --picture P`.

Each number is of a fresh process. The floor is a process that only imports torch, plus the seconds that the model's own
load and forward pass take inside another one, all of Vitrail imported before. The claim is at most 1.5 times the floor;
exit code 1 if even the low end of the interval is above it. Processor time is recorded too: it moves less with what else
the machine does. 2 minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import measure
import numpy as np
from PIL import Image

import vitrail
from vitrail.benchmark.alternation import ratio

MOST = 1.5
OWN = """
import json, sys, time
import torch
import vitrail.commands.predict
from vitrail.data.transforms import Transform
from vitrail.weights.load import load
def seconds(work):
    begun, used = time.perf_counter(), time.process_time()
    found = work()
    return found, time.perf_counter() - begun, time.process_time() - used
model, *first = seconds(lambda: load(sys.argv[1]))
pixels = torch.zeros((1, model.preprocess.channels, *model.preprocess.size), dtype=torch.uint8)
with torch.inference_mode():
    _, *second = seconds(lambda: model(pixels))
print(json.dumps([a + b for a, b in zip(first, second)]))
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["ViT-S/16", "ViT-B/16"], help="by name, with random weights")
    parser.add_argument("--picture", type=Path, help="a picture file; none: smooth noise of 500 x 375 pixels")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings = parser.parse_args()
    found, held = {}, True
    for name in settings.model:
        with tempfile.TemporaryDirectory() as folder:
            vitrail.save(vitrail.create(name, classes=1000, seed=0), folder)
            picture = settings.picture or draw(Path(folder) / "picture.jpg")
            rounds = [one(folder, str(picture), number) for number in range(settings.rounds + 1)][1:]  # one warms up
        entry = {"rounds": rounds}
        for clock, kind in enumerate(("wall", "processor")):
            whole = [each["predict"][clock] for each in rounds]
            floor = [each["torch"][clock] + each["own"][clock] for each in rounds]
            entry[kind] = {
                "seconds": float(np.median(whole)),
                "floor": float(np.median(floor)),
                "ratio": vars(ratio(whole, floor)),
            }
            print(f"{name}: {kind} {entry[kind]}; at most {MOST}")
        held &= entry["wall"]["ratio"]["low"] <= MOST
        found[name] = entry
    measure.write("start", {"at_most": MOST, "models": found}, settings.out)
    return int(not held)


def one(weights: str, picture: str, number: int) -> dict[str, tuple[float, float]]:
    """(wall, processor) seconds of each, in an order that turns round."""
    commands = {
        "predict": ["-m", "vitrail", "predict", weights, picture],
        "torch": ["-c", "import torch"],
        "own": ["-c", OWN, weights],
    }
    found = {}
    for name in sorted(commands, reverse=number % 2 == 1):
        before, begun = os.times(), time.perf_counter()
        done = subprocess.run([sys.executable, *commands[name]], check=True, capture_output=True, text=True)
        passed, after = time.perf_counter() - begun, os.times()
        used = after.children_user + after.children_system - before.children_user - before.children_system
        found[name] = tuple(json.loads(done.stdout)) if name == "own" else (passed, used)
    return found


def draw(place: Path) -> Path:
    small = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC).save(place, quality=90)
    return place


if __name__ == "__main__":
    sys.exit(main())
