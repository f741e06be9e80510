"""Draws the README's picture from a finished run: `python scripts/make_pictures.py RUN`.

    python bench/from_scratch.py --keep RUN

Above: the first test picture of each class, cut into the patches that the model reads. Below each: the same patches in
colours of what they have become halfway through the model: the three main directions in which tokens differ there, over
all test pictures, as red, green and blue. At the bottom: the run's accuracy, and what pixels alone give.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import vitrail
from vitrail.core.runs import read_json
from vitrail.core.types import Source
from vitrail.data.splits import open_data
from vitrail.evaluation.baselines import pixel_baselines
from vitrail.models.classifier import Classifier

OUT = Path(__file__).parents[1] / "docs" / "pictures" / "demo.png"
INK, FAINT, RIGHT, WRONG, CURVE = "#24292f", "#8c959f", "#1a7f37", "#cf222e", "#3f78d8"
SHOWN = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder of `vitrail train`")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    config, model = read_json(arguments.run / "config.json"), vitrail.load(arguments.run).eval()
    began = config["settings"]
    splits = open_data(config["data"]["origin"], validation=began["validation"], seed=began["seed"])
    assert splits.test is not None, "the picture needs a run on data with a test split"
    pixels, labels = prepared(splits.test, model)
    grids, probabilities = seen(model, pixels)
    colours = windows(grids)
    places = [int(np.flatnonzero(labels == label)[0]) for label in range(min(SHOWN, len(splits.test.classes)))]

    figure = Figure(figsize=(10, 5.2), facecolor="white")
    side, step = 0.0905, 0.0985
    for column, place in enumerate(places):
        left, true = 0.0115 + column * step, model.labels[labels[place]]
        above, below = (figure.add_axes((left, bottom, side, side * 10 / 5.2)) for bottom in (0.812, 0.612))
        pane(above, pixels[place].permute(1, 2, 0).numpy() / 255, model, "white")
        pane(below, colours[place], model, INK)
        guess = int(probabilities[place].argmax())
        text = {"transform": below.transAxes, "ha": "center", "va": "top"}
        right = guess == labels[place]
        below.text(0.5, -0.06, model.labels[guess], fontsize=9, color=RIGHT if right else WRONG, **text)
        said = f"{probabilities[place, guess]:.0%}" + ("" if right else f", but is: {true}")
        below.text(0.5, -0.23, said, fontsize=7, color=FAINT, **text)
    axis = figure.add_axes((0.055, 0.085, 0.935, 0.36))
    training, training_labels = prepared(splits.train, model)
    rows = pixel_baselines(
        training, torch.from_numpy(training_labels), pixels, torch.from_numpy(labels), len(model.labels), seed=0
    )
    curve(axis, arguments.run, [(row.name, row.value) for row in rows])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=150)
    print(f"{arguments.out}: {arguments.out.stat().st_size // 1024} KiB")


def prepared(source: Source, model: Classifier) -> tuple[torch.Tensor, np.ndarray]:
    pictures = vitrail.read([source[index].picture for index in range(len(source))], model.preprocess)
    return pictures, np.asarray(source.labels).copy()


def seen(model: Classifier, pixels: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the middle block (n, y, x, d), and the probability of each class (n, k)."""
    tokens, probabilities = [], []
    middle = model.backbone.depth // 2 - 1
    with torch.no_grad():
        for part in pixels.split(250):
            (features,) = model.backbone.features(model.preprocess.normalize(part), keep=(middle,)).layers
            assert features.grid is not None
            tokens.append(features.tokens.unflatten(1, features.grid))
            probabilities.append(model(part).softmax(1))
    return torch.cat(tokens).numpy(), torch.cat(probabilities).numpy()


def windows(grids: np.ndarray) -> np.ndarray:
    """Tokens (n, y, x, d) to colours (n, y, x, 3) in [0, 1]: each of the three directions from its 2nd percentile to
    its 98th."""
    rows = grids.reshape(-1, grids.shape[-1]) - grids.mean((0, 1, 2))
    _, axes = np.linalg.eigh(rows.T @ rows)
    found = rows @ axes[:, : -3 - 1 : -1]
    low, high = np.percentile(found, (2, 98), axis=0)
    return np.clip((found - low) / (high - low), 0, 1).reshape(*grids.shape[:3], 3)


def pane(axis: Axes, picture: np.ndarray, model: Classifier, lead: str) -> None:
    """A picture (h, w, 3) in [0, 1], whole or one colour a patch, as panes between lines of lead."""
    y, x = model.backbone.config.grid
    axis.imshow(picture, extent=(0, x, y, 0), interpolation="nearest")
    for place in range(max(y, x) + 1):
        axis.plot((place, place), (0, y), color=lead, linewidth=1)
        axis.plot((0, x), (place, place), color=lead, linewidth=1)
    axis.set_axis_off()


def curve(axis: Axes, run: Path, baselines: list[tuple[str, float]]) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [(line["epoch"], line["validation/accuracy"]) for line in lines if "validation/accuracy" in line]
    headline = read_json(run / "results.json")
    epochs, values = zip(*measured, strict=True)
    axis.plot(epochs, values, color=CURVE, marker="o", markersize=3)
    best, minutes = headline["rows"][0], headline["seconds"] / 60
    said = f"{best['value']:.1f} % of {best['count']:,} test pictures, after {minutes:.1f} minutes of training"
    axis.set_title(said, fontsize=9.5, loc="left", color=INK)
    for value in sorted({round(value, 1) for _, value in baselines}):
        axis.axhline(value, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
    for names, value in labels(baselines):
        axis.annotate(names, (0, value), (4, 2), textcoords="offset points", fontsize=8, color=FAINT)
    axis.set_ylim(bottom=max(0, min(*(value for _, value in baselines), values[len(values) // 4]) - 4))
    axis.set_xlim(0, epochs[-1] * 1.005)
    axis.set_xlabel("epochs", fontsize=8, color=INK)
    axis.set_ylabel("held-out accuracy (%)", fontsize=8, color=INK)
    axis.tick_params(labelsize=8, colors=INK)
    axis.spines[["top", "right"]].set_visible(False)


def labels(baselines: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """A label a line, or one for lines that lie so close that two would cover each other."""
    found: list[tuple[str, float]] = []
    for name, value in sorted(baselines, key=lambda item: item[1]):
        said = f"{name}: {value:.1f} %"
        if found and value - found[-1][1] < 1.5:
            said, _ = f"{found[-1][0]};  {said}", found.pop()
        found.append((said, value))
    return found


if __name__ == "__main__":
    main()
