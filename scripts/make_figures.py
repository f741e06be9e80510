"""Draws docs/pictures/inside-*.png: `python scripts/make_figures.py DINOV2S`, the weights of DINOv2-S/14.

Three models beside each other: DINOv2-S/14 with its trained weights, vitrail:ViT-Micro/7, and DINOv2-S/14's architecture
with random weights. The pictures in them are of sample:fashion and the tour's photograph. What each shows of the paper's
findings is printed in numbers and goes to results/inside_findings-DATE.json.
"""

import argparse
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

import vitrail
from vitrail.analysis import figures_inside as draw
from vitrail.analysis.attention import attention_distances, uniform_distance
from vitrail.analysis.data_map import neighbours_alike, plane
from vitrail.analysis.figures_inside import Pane, display
from vitrail.analysis.filters import filter_components
from vitrail.analysis.gallery import BRIGHT, brightened
from vitrail.analysis.internals import Model, trace, vit_of
from vitrail.analysis.position_similarity import PlacesAlike, position_similarity, structure
from vitrail.analysis.rollout import rollout
from vitrail.analysis.tokens import token_colours
from vitrail.benchmark import record
from vitrail.data.sources import limit, read_sample
from vitrail.inference.features import extract

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "pictures"
SIDE = 224
COUNT, SHOWN = 64, 8
DINO, OWN, RANDOM = "DINOv2-S/14, trained", "ViT-Micro/7, trained", "DINOv2-S/14, random weights"
CAT = OUT / "tour" / "cat.jpg"
SQUARE = (75, 0, 375, 300)
"""The middle of the photograph: left, top, right, bottom."""
EYES_AND_NOSE = ((90, 63, 145, 108), (193, 82, 237, 122), (157, 152, 195, 182))
"""Where they are in that square, in pixels."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dino", type=Path, help="the weights of DINOv2-S/14")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--numbers", type=Path, default=ROOT / "results", help="the folder of the JSON")
    arguments = parser.parse_args()
    own, table = vitrail.load("vitrail:ViT-Micro/7").eval(), vitrail.load_backbone(arguments.dino)
    dino = vitrail.load_backbone(arguments.dino, image=(SIDE, SIDE), preprocess=f"resize={SIDE},size={SIDE}").eval()
    random = vit_of(dino).config.build(seed=0).eval()
    random.preprocess = dino.preprocess
    models: dict[str, Model] = {DINO: dino, OWN: own, RANDOM: random}
    source = read_sample("fashion", "test")
    pictures = [source[index].picture for index in range(COUNT)]
    pixels = {name: vitrail.read(pictures, model.preprocess) for name, model in models.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)
    numbers: dict[str, dict[str, Any]] = {name: {} for name in models}

    def measured(finding: str, name: str, **values: float) -> None:
        numbers[name][finding] = {key.replace("_", " "): round(float(value), 4) for key, value in values.items()}
        print(f"{finding:<11}{name}: " + ", ".join(f"{key} {value}" for key, value in numbers[name][finding].items()))

    found = {name: filter_components(model) for name, model in models.items()}
    for name, (components, shares) in found.items():
        measured("filters", name, components=len(shares), first_28_explain=shares[:28].sum(), smooth=smooth(components))
    caption = (
        "Principal components of the first layer's filters (the paper's Fig. 7, left). Grey is 0; signs mean nothing."
    )
    write(draw.filters(found, caption), arguments.out / "inside-filters.png")

    # The table as it was trained, on its own grid.
    places: dict[str, PlacesAlike] = {}
    for name, model in {DINO: table, OWN: own, RANDOM: replace(table.config).build(seed=0)}.items():
        places[name] = position_similarity(model)
        plan = structure(places[name].values)
        measured("positions", name, nearness=plan.nearness, same_row_or_column=plan.lines, elsewhere=plan.elsewhere)
    caption = (
        "Similarity of position embeddings (the paper's Fig. 7, centre): each tile compares one patch with all others. "
        "Nearness, rows and columns show in trained tables; a random table knows nothing."
    )
    write(draw.places(places, caption), arguments.out / "inside-positions.png")

    distances, clothes, colours = {}, {}, {}
    for name, model in models.items():
        far, flows, tokens = [], [], []
        for part in pixels[name].split(8):
            of = trace(model, part)
            far.append(attention_distances(of))
            flows.append(of.on_grid(rollout(of)))
            tokens.append(of.features.tokens)
        mean, config = np.concatenate(far).mean(0), vit_of(model).config
        even = uniform_distance(config.grid, config.stride)
        distances[name], clothes[name] = (mean, even), np.concatenate(flows)
        colours[name] = token_colours(torch.cat(tokens))[0].reshape(*clothes[name].shape, 3)
        first, least = mean[: max(1, len(mean) // 4)] / even, np.unravel_index(mean.argmin(), mean.shape)
        measured(
            "distance",
            name,
            even_pixels=even,
            first_quarter_nearest_head=first.min(),
            first_quarter_farthest_head=first.max(),
            first_block=mean[0].mean() / even,
            last_block=mean[-1].mean() / even,
            nearest_head=mean.min() / even,
            in_block=least[0] + 1,
            correlation_with_depth=np.corrcoef(np.arange(len(mean)), mean.mean(1))[0, 1],
        )
    caption = (
        f"Mean attention distance by head and block over {COUNT} pictures of sample:fashion (the paper's Fig. 7, right, and "
        f"11), at {SIDE} pixels for DINOv2 and {own.preprocess.size[0]} for ViT-Micro/7."
    )
    write(draw.distances(distances, caption), arguments.out / "inside-distance.png")

    original, size = [display(one) for one in vitrail.read(pictures, own.preprocess)], own.preprocess.size
    lit = [picture.max(2) > 25 for picture in original]  # these pictures are black where nothing is
    with Image.open(CAT) as whole:
        cat = whole.crop(SQUARE)
    file, face = io.BytesIO(), np.zeros(cat.size[::-1], bool)
    cat.save(file, "PNG")
    for left, top, right, bottom in EYES_AND_NOSE:
        face[top:bottom, left:right] = True
    shown, above, below = np.asarray(cat), [], []
    for name, model in models.items():
        of = trace(model, vitrail.read([file.getvalue()], model.preprocess))
        flow = of.on_grid(rollout(of))
        measured(
            "rollout", name, on_eyes_and_nose=lift(flow, [face]), patch=np.prod(vit_of(model).config.stride) ** 0.5,
            on_clothes=lift(clothes[name], lit),
        )  # fmt: skip
        bright = brightened(flow[0])
        above.append(Pane(bright, name))
        below.append(Pane(draw.masked(shown, bright)))
    caption = (
        f"Attention rollout (the paper's Fig. 6 and 14), each map from 0 to its {BRIGHT}th percentile: how much of each "
        "patch reaches the answer; below, multiplied onto the picture."
    )
    rows = ("rollout", "picture x rollout")
    write(
        draw.panes(
            [[*above, Pane(shown, "picture")], below],
            size=face.shape,
            caption=caption,
            rows=rows,
            scale="share",
            side=1.8,
        ),
        arguments.out / "inside-rollout.png",
    )
    panes = [[Pane(picture) for picture in original[:SHOWN]]]
    panes += [[Pane(values) for values in found[:SHOWN]] for found in colours.values()]
    caption = (
        f"The three principal components of the last patch tokens as red, green and blue, found over {COUNT} pictures of "
        "sample:fashion for each model: in a row, equal colours are equal directions."
    )
    names = ("picture", "DINOv2-S/14", "ViT-Micro/7", "random")
    write(draw.panes(panes, size=size, caption=caption, rows=names, side=1.05), arguments.out / "inside-colours.png")

    chosen = limit(source, 600, 0)
    features = extract(own, chosen, own.preprocess)
    where, labels = plane(features.features.numpy()), features.labels.numpy()
    near = neighbours_alike(where, labels)
    measured("map", OWN, of_its_class=near)
    caption = (
        f"{len(where)} test pictures of sample:fashion by the features of ViT-Micro/7, by t-SNE: {100 * near:.0f} % of a "
        "picture's 10 nearest are of its class."
    )
    write(
        draw.data_plane(where, labels, source.classes, caption),
        arguments.out / "inside-map.png",
    )
    stamped = record.stamped("inside_findings", {"pictures": COUNT, "models": numbers})
    record.write(arguments.numbers / f"inside_findings-{stamped['date']}.json", stamped)


def smooth(components: np.ndarray) -> float:
    """How like neighbouring pixels of filters are: 1 where all are equal, 0 for noise."""
    beside = (components[..., 1:] * components[..., :-1]).sum() + (
        components[..., 1:, :] * components[..., :-1, :]
    ).sum()
    sides = [np.square(part).sum() for part in (components[..., 1:], components[..., :-1])]
    ends = [np.square(part).sum() for part in (components[..., 1:, :], components[..., :-1, :])]
    return float(2 * beside / sum(sides + ends))


def lift(maps: np.ndarray, objects: list[np.ndarray]) -> float:
    """The mean of the maps on patches of objects, weighted by how much of each is one, over that on all patches."""
    found = []
    for values, mask in zip(maps, objects, strict=True):
        covered = Image.fromarray(mask.astype(np.float32)).resize(values.shape[::-1], Image.Resampling.BOX)
        weight = np.asarray(covered)
        found.append((values * weight).sum() / weight.sum() / values.mean())
    return float(np.mean(found))


def write(figure: Figure, path: Path) -> None:
    """With 256 colours, which these figures do not notice."""
    figure.savefig(path, dpi=130, transparent=True)
    with Image.open(path) as image:
        image.quantize(256, method=Image.Quantize.FASTOCTREE).save(path, optimize=True)
    print(f"{path.name}: {path.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
