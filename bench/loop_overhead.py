"""What `fit` costs over a bare PyTorch loop on the same pictures in memory: `python bench/loop_overhead.py`.

Both train the same model from the same weights on sample:fashion, with AdamW, cosine rate, clipping and fp32, with no
augmentation but normalising. The bare loop is what one would write by hand: shuffle, index, forward, backward, step.
`fit` brings its loader, its objective, its check for finite losses, its metrics and its handling of signals.

The claim is at most 3 %; the exit code is 1 if even the low end of the interval is above that. About 4 minutes.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import measure
import torch
import torch.nn.functional as F
from torch import nn

from vitrail.core.types import Preprocess
from vitrail.data.augment import Augmentation
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.sources import read_sample
from vitrail.data.transforms import Transform
from vitrail.objectives.supervised import Supervised
from vitrail.training.log import Metrics
from vitrail.training.loop import Pace, fit
from vitrail.training.optim import Optimiser, Schedule, decays, set_rate
from vitrail.weights import zoo

MOST = 1.03
OPTIMISER, SCHEDULE = Optimiser(rate=1e-3, weight_decay=0.05), Schedule(warmup=5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-Nano/4")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=40, help="a round")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of measurements")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings = parser.parse_args()
    device = torch.device(settings.device)

    source = read_sample("fashion", "train")
    preprocess = Preprocess((28, 28), mean=(0.5,), deviation=(0.5,))
    start = zoo.create(settings.model, labels=source.classes, pool="mean", preprocess=preprocess, seed=0)
    samples = settings.steps * settings.batch
    loader = PictureLoader(source, Transform(preprocess), Order(len(source), settings.batch, samples), hold=True)
    next(loader.batches())  # reads all pictures into memory, before any clock runs
    assert loader.hold
    pixels = torch.cat([batch.views[0] for batch in everything(source, preprocess)])
    labels = torch.from_numpy(source.labels.copy())
    folder = Path(tempfile.mkdtemp())

    def whole() -> None:
        metrics = Metrics(folder / "metrics.jsonl")
        fit(
            copy.deepcopy(start),
            lambda model: Supervised(model, len(source.classes), preprocess, Augmentation(flip=False)),
            loader,
            optimiser=OPTIMISER,
            schedule=SCHEDULE,
            pace=Pace(evaluate_every=10**9, log_every=10, checks=1 if device.type == "cpu" else 10),
            device=device,
            logs=[metrics],
        )
        metrics.close()

    def bare() -> None:
        train(copy.deepcopy(start).to(device), pixels, labels, preprocess, settings.steps, settings.batch, device)

    measure.alternate(bare, whole, 1)  # warms up
    seconds = measure.alternate(bare, whole, settings.rounds)
    ratio = measure.median_ratio(*seconds)
    print(f"fit / bare loop: {ratio['median']:.4f} [{ratio['low']:.4f}, {ratio['high']:.4f}]; at most {MOST}")
    given = {key: str(value) for key, value in vars(settings).items() if key != "out"}
    found = {"ratio": ratio, "at_most": MOST, "bare_seconds": seconds[0], "fit_seconds": seconds[1], "settings": given}
    measure.write("loop_overhead", found, settings.out)
    return int(ratio["low"] > MOST)


def everything(source, preprocess: Preprocess) -> PictureLoader:
    return PictureLoader(source, Transform(preprocess), Order(len(source), 250, len(source), shuffle=False))


def train(
    model: nn.Module,
    pixels: torch.Tensor,
    labels: torch.Tensor,
    preprocess: Preprocess,
    steps: int,
    batch: int,
    device: torch.device,
) -> None:
    """The loop that one would write by hand."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": OPTIMISER.weight_decay},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=OPTIMISER.rate, betas=OPTIMISER.betas, fused=True)
    random = torch.Generator().manual_seed(0)
    model.train()
    order = torch.randperm(len(labels), generator=random)
    for step in range(steps):
        if len(order) < batch:
            order = torch.cat([order, torch.randperm(len(labels), generator=random)])
        places, order = order[:batch], order[batch:]
        images, wanted = pixels[places].to(device), labels[places].to(device)
        loss = F.cross_entropy(model(preprocess.normalize(images)), wanted)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIMISER.clip)
        set_rate(optimiser, OPTIMISER.rate * SCHEDULE.factor(step, steps))
        optimiser.step()
        optimiser.zero_grad()
    loss.item()


if __name__ == "__main__":
    sys.exit(main())
