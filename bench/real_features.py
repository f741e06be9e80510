"""What the features of a real checkpoint are worth: `python bench/real_features.py dinov2s.pt imagenette-small`, 4 minutes.

Class tokens of the validation pictures are classified by their nearest neighbour among those of the training pictures
(cosine), and by ridge regression; beside the same from the same model with random weights, and beside the pixels alone.
Nothing is trained. The weights and pictures are not part of the project.
"""

import argparse
import sys
from pathlib import Path

import measure
import torch
import torch.nn.functional as F
from torch import Tensor

from vitrail.core.types import Row, Source
from vitrail.core.values import to_json
from vitrail.data.splits import open_data
from vitrail.data.transforms import Transform
from vitrail.evaluation.baselines import pixel_baselines
from vitrail.evaluation.metrics import wilson
from vitrail.models.vit import ViT
from vitrail.weights.load import load_backbone

PENALTIES = (1e-2, 1e-1, 1.0, 10.0, 100.0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("data")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings = parser.parse_args()
    splits = open_data(settings.data, validation=0.0)
    held_out = splits.validation or splits.test
    assert held_out is not None, "the data need a validation or test split"
    trained = load_backbone(settings.weights)
    assert isinstance(trained, ViT)
    untrained = trained.config.build(seed=0).eval()
    untrained.preprocess = trained.preprocess
    train, test = pixels(splits.train, trained), pixels(held_out, trained)
    labels, asked = torch.from_numpy(splits.train.labels), torch.from_numpy(held_out.labels)
    rows = []
    for name, model in (("trained", trained), ("random weights", untrained)):
        known, new = class_tokens(model, train), class_tokens(model, test)
        nearest = labels[(F.normalize(new) @ F.normalize(known).T).argmax(1)]
        rows.append(row(f"{name}: nearest neighbour", nearest, asked))
        rows.append(row(f"{name}: ridge", ridge(known, labels, new, len(splits.train.classes)), asked))
    rows += pixel_baselines(train, labels, test, asked, len(splits.train.classes), seed=0)
    for found in rows:
        print(f"{found.name}: {found.value:.1f} % [{found.low:.1f}, {found.high:.1f}]")
    report = {
        "weights": settings.weights.name,
        "sha256": trained.report.sha256,
        "rows": [to_json(found) for found in rows],
    }  # type: ignore[union-attr]
    measure.write("real_features", report, settings.out)
    return 0


def pixels(source: Source, model: ViT) -> Tensor:
    """(n, c, h, w) uint8, as the model's own preprocessing has them."""
    transform = Transform(model.preprocess)
    samples = (source[index] for index in range(len(source)))
    return torch.stack([torch.from_numpy(transform(sample.picture, None, sample.name)) for sample in samples])


@torch.inference_mode()
def class_tokens(model: ViT, images: Tensor) -> Tensor:
    normalize = model.preprocess.normalize
    return torch.cat([model.features(normalize(part)).prefix[:, 0] for part in images.split(20)])


def ridge(train: Tensor, labels: Tensor, test: Tensor, classes: int) -> Tensor:
    """The penalty is the best of a few under 5 folds of the training pictures."""
    folds = torch.randperm(train.shape[0], generator=torch.Generator().manual_seed(0)) % 5

    def right(penalty: float) -> int:
        parts = (folds == fold for fold in range(5))
        return sum(int((solve(train[~p], labels[~p], train[p], classes, penalty) == labels[p]).sum()) for p in parts)

    return solve(train, labels, test, classes, max(PENALTIES, key=right))


def solve(train: Tensor, labels: Tensor, test: Tensor, classes: int, penalty: float) -> Tensor:
    mean, deviation = train.mean(0), train.std(0) + 1e-5
    x, y = ((train - mean) / deviation).double(), 2 * F.one_hot(labels, classes).double() - 1
    gram = x.T @ x + penalty * x.shape[0] * torch.eye(x.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(gram, x.T @ (y - y.mean(0)))
    return (((test - mean) / deviation).double() @ weights + y.mean(0)).argmax(1)


def row(name: str, predicted: Tensor, labels: Tensor) -> Row:
    right, count = int((predicted == labels).sum()), labels.shape[0]
    low, high = wilson(right, count)
    return Row(name, 100 * right / count, 100 * low, 100 * high, count)


if __name__ == "__main__":
    sys.exit(main())
