"""What masked patch prediction learns without labels, and what it costs: `python bench/masked_patch.py --minutes 5`.

A small ViT is pre-trained on the training pictures of `sample:fashion`, whose labels are not read. Then a linear probe
(logistic regression on frozen features, its penalty chosen on training pictures) is asked about the 2,000 test pictures,
beside the same probe on the same model with random weights, of several seeds, and on the pixels. The claim: above the best
of the random ones by more than chance, counted on the pictures where the two differ.

Then the same steps of training are timed in turns with labels (Supervised) and without (MaskedPatches). The claim: at
most 10 % more. Exit code 1 where either is not so.
"""

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import measure
import torch
from torch import Tensor

from vitrail.core.device import Precision, pick_device
from vitrail.core.types import Preprocess, Row, Source
from vitrail.core.values import to_json
from vitrail.data.augment import Augmentation
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.sources import read_sample
from vitrail.data.transforms import Transform
from vitrail.evaluation.linear import linear
from vitrail.evaluation.metrics import NORMAL_95, wilson
from vitrail.experiments.recipe import PRETRAIN, with_settings
from vitrail.experiments.run import run
from vitrail.inference.features import extract
from vitrail.models.masked import MaskedPatchConfig
from vitrail.models.vit import ViT
from vitrail.objectives.masked import MaskedPatches
from vitrail.objectives.supervised import Supervised
from vitrail.training.loop import Pace, fit
from vitrail.training.optim import Optimiser, Schedule
from vitrail.weights.load import load_backbone
from vitrail.weights.zoo import create

MOST = 1.10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-Nano/7")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--targets", default="mean-colour")
    parser.add_argument("--seeds", type=int, default=3, help="of random weights to compare with")
    parser.add_argument("--rounds", type=int, default=9, help="pairs of timings")
    parser.add_argument("--steps", type=int, default=20, help="a timing")
    parser.add_argument("--device", default="")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings = parser.parse_args()
    device = pick_device(settings.device or None)

    folder = Path(tempfile.mkdtemp()) / "run"
    asked = {
        "data": "sample:fashion",
        "model": settings.model,
        "minutes": settings.minutes,
        "targets": settings.targets,
    }
    result = run(with_settings(PRETRAIN, {**asked, "device": settings.device, "out": str(folder)}, "the bench"))
    train, test = read_sample("fashion", "train"), read_sample("fashion", "test")
    trained = load_backbone(folder)
    assert isinstance(trained, ViT)
    right = {"pre-trained without labels": probe(trained, train, test, device)}
    for seed in range(settings.seeds):
        untrained = trained.config.build(seed)
        untrained.preprocess = trained.preprocess
        right[f"random weights, seed {seed}"] = probe(untrained, train, test, device)
    known, new = pixels(train, trained.preprocess), pixels(test, trained.preprocess)
    right["pixels"] = answered(known, new, train, test)
    rows = [row(name, hits) for name, hits in right.items()]
    for found in rows:
        print(f"linear probe, {found.name}: {found.value:.2f} % [{found.low:.2f}, {found.high:.2f}]")
    ours, *others = right.values()
    best = max(others[: settings.seeds], key=lambda hits: float(hits.double().mean()))
    margin = difference("pre-trained minus the best random weights", ours, best)
    print(f"{margin.name}: {margin.value:.2f} points [{margin.low:.2f}, {margin.high:.2f}]")

    seconds, ratio = cost(settings.model, settings.steps, settings.rounds, device)
    print(f"masked / supervised: {ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]; at most {MOST}")
    found = {
        "settings": {key: str(value) for key, value in vars(settings).items() if key != "out"},
        "pretraining": [to_json(one) for one in result.rows],
        "pretraining_seconds": None if result.outcome is None else round(result.outcome.seconds, 1),
        "steps": None if result.outcome is None else result.outcome.total,
        "linear_probe": [to_json(one) for one in (*rows, margin)],
        "time": {"ratio": ratio, "at_most": MOST, "supervised_seconds": seconds[0], "masked_seconds": seconds[1]},
    }
    measure.write("masked_patch", found, settings.out)
    assert margin.low is not None
    return int(margin.low <= 0 or ratio["low"] > MOST)


def probe(model: ViT, train: Source, test: Source, device: torch.device) -> Tensor:
    """(n,) bool: which test pictures a linear probe on the model's features is right about."""
    model = model.to(device).eval()
    known, new = (extract(model, source, model.preprocess, device=device, batch=250) for source in (train, test))
    return answered(known.features, new.features, train, test)


def answered(known: Tensor, new: Tensor, train: Source, test: Source) -> Tensor:
    chosen = linear(known, torch.from_numpy(train.labels.copy()), len(train.classes))
    return chosen.head(new).argmax(1) == torch.from_numpy(test.labels.copy())


def pixels(source: Source, preprocess: Preprocess) -> Tensor:
    transform = Transform(preprocess)
    samples = (source[index] for index in range(len(source)))
    seen = torch.stack([torch.from_numpy(transform(sample.picture, None, sample.name)) for sample in samples])
    return preprocess.normalize(seen)[:, 0].flatten(1)  # grey, so one channel holds it all


def row(name: str, right: Tensor) -> Row:
    hits, count = int(right.sum()), right.shape[0]
    low, high = wilson(hits, count)
    return Row(name, 100 * hits / count, 100 * low, 100 * high, count)


def difference(name: str, right: Tensor, other: Tensor) -> Row:
    """In points, of two answers to the same pictures, with the normal interval of the paired difference."""
    each = right.double() - other.double()
    half = NORMAL_95 * float(each.std()) / each.shape[0] ** 0.5
    mean = float(each.mean())
    return Row(name, 100 * mean, 100 * (mean - half), 100 * (mean + half), each.shape[0], "points")


def cost(name: str, steps: int, rounds: int, device: torch.device) -> tuple[tuple[list[float], list[float]], dict]:
    """Seconds of the same number of steps with labels and without, and the ratio."""
    source, preprocess = read_sample("fashion", "train"), Preprocess((28, 28))
    classifier = create(name, labels=source.classes, pool="mean", preprocess=preprocess, positions="sincos2d")
    assert isinstance(classifier.backbone, ViT)
    config = MaskedPatchConfig(classifier.backbone.config)
    predictor, augmentation = config.build(), Augmentation(flip=True, shift=1)
    loader = PictureLoader(source, Transform(preprocess), Order(len(source), 128, 128 * steps), hold=True)
    next(loader.batches())  # reads all pictures into memory, before any clock runs
    precision: Precision = "bf16" if device.type == "cuda" else "fp32"
    pace = Pace(precision=precision, evaluate_every=10**9, log_every=10, checks=1 if device.type == "cpu" else 10)

    def timed(model, task) -> None:
        settings = {"optimiser": Optimiser(rate=1e-3), "schedule": Schedule(warmup=5), "pace": pace, "device": device}
        fit(copy.deepcopy(model), task, loader, **settings)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def supervised() -> None:
        timed(classifier, lambda model: Supervised(model, len(source.classes), preprocess, augmentation))

    def masked() -> None:
        timed(predictor, lambda model: MaskedPatches(model, config, preprocess, augmentation))

    measure.alternate(supervised, masked, 1)  # warms up
    seconds = measure.alternate(supervised, masked, rounds)
    return seconds, measure.median_ratio(*seconds)


if __name__ == "__main__":
    sys.exit(main())
