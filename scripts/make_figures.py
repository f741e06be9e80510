"""Draws docs/pictures/inside-*.png: `python scripts/make_figures.py OWN DINOV2S`, both checkpoints.

Three models beside each other: DINOv2-S/14 with its trained weights, our own small one, and DINOv2-S/14's architecture with
random weights. Every picture in them is of sample:fashion. Prints what each shows of the paper's findings, in numbers.
"""

import argparse
from dataclasses import replace
from pathlib import Path

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
from vitrail.analysis.gallery import BRIGHT
from vitrail.analysis.internals import Model, trace, vit_of
from vitrail.analysis.position_similarity import PlacesAlike, position_similarity, structure
from vitrail.analysis.rollout import rollout
from vitrail.analysis.tokens import token_colours
from vitrail.data.sources import limit, read_sample
from vitrail.inference.features import extract

OUT = Path(__file__).parents[1] / "docs" / "pictures"
SIDE = 224
COUNT, SHOWN = 64, 8
DINO, OWN, RANDOM = "DINOv2-S/14, trained", "ours, trained", "DINOv2-S/14, random weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("own", type=Path, help="a small classifier of ours, trained on sample:fashion")
    parser.add_argument("dino", type=Path, help="the weights of DINOv2-S/14")
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    own, table = vitrail.load(arguments.own).eval(), vitrail.load_backbone(arguments.dino)
    dino = vitrail.load_backbone(arguments.dino, image=(SIDE, SIDE), preprocess=f"resize={SIDE},size={SIDE}").eval()
    random = vit_of(dino).config.build(seed=0).eval()
    random.preprocess = dino.preprocess
    models: dict[str, Model] = {DINO: dino, OWN: own, RANDOM: random}
    source = read_sample("fashion", "test")
    pictures = [source[index].picture for index in range(COUNT)]
    pixels = {name: vitrail.read(pictures, model.preprocess) for name, model in models.items()}
    arguments.out.mkdir(parents=True, exist_ok=True)

    found = {name: filter_components(model) for name, model in models.items()}
    for name, (components, shares) in found.items():
        print(
            f"filters    {name}: the first {len(components)} of {len(shares)} explain {100 * shares[:28].sum():.1f} %"
        )
    caption = (
        "Principal components of the first layer's filters (the paper's Fig. 7, left). Grey is 0; signs mean nothing."
    )
    write(draw.filters(found, caption), arguments.out / "inside-filters.png")

    # The table as it was trained, on its own grid.
    places: dict[str, PlacesAlike] = {}
    for name, model in {DINO: table, OWN: own, RANDOM: replace(table.config).build(seed=0)}.items():
        places[name] = position_similarity(model)
        measured = structure(places[name].values)
        print(
            f"positions  {name}: {vit_of(model).config.positions}; nearness {measured.nearness:.2f}, same row or column "
            f"{measured.lines:.3f}, elsewhere at the same distance {measured.elsewhere:.3f}"
        )
    caption = (
        "Similarity of position embeddings (the paper's Fig. 7, centre): each tile compares one patch with all others. Rows "
        "and columns show in trained tables, and in sines by their formula; a random table knows nothing."
    )
    write(draw.places(places, caption), arguments.out / "inside-positions.png")

    distances = {}
    for name, model in models.items():
        mean = np.concatenate([attention_distances(trace(model, part)) for part in pixels[name].split(8)]).mean(0)
        config = vit_of(model).config
        distances[name] = mean, uniform_distance(config.grid, config.stride)
        even, first = distances[name][1], mean[: max(1, len(mean) // 4)] / distances[name][1]
        print(
            f"distance   {name}: even {even:.1f} px; first quarter of the blocks: heads from {first.min():.0%} to "
            f"{first.max():.0%} of it; last block {mean[-1].mean() / even:.0%}"
        )
    caption = (
        f"Mean attention distance by head and block over {COUNT} pictures of sample:fashion (the paper's Fig. 7, right, and "
        f"11), at {SIDE} pixels for DINOv2 and {own.preprocess.size[0]} for ours."
    )
    write(draw.distances(distances, caption), arguments.out / "inside-distance.png")

    original = [display(one) for one in vitrail.read(pictures, own.preprocess)]
    size = own.preprocess.size
    rows, colours = {}, {}
    for name, model in models.items():
        flows, tokens = [], []
        for part in pixels[name].split(8):
            of = trace(model, part)
            flows.append(of.on_grid(rollout(of)))
            tokens.append(of.features.tokens)
        maps = np.concatenate(flows)
        rows[name] = maps
        shown, _ = token_colours(torch.cat(tokens))
        colours[name] = shown.reshape(*maps.shape, 3)
        print(f"rollout    {name}: {lift(maps, original):.2f} times as much on the object as on all of the picture")
    panes = [[Pane(picture) for picture in original[:SHOWN]]]
    for maps in rows.values():
        tops = np.percentile(maps[:SHOWN], BRIGHT, axis=(1, 2), keepdims=True)
        panes.append([Pane(values) for values in np.clip(maps[:SHOWN] / tops, 0, 1)])
    names = ("picture", "DINOv2-S/14", "ours", "random")
    caption = (
        f"Attention rollout (the paper's Fig. 6 and 14) on pictures of sample:fashion, each from 0 to its {BRIGHT}th "
        "percentile: how much of each patch reaches the answer."
    )
    write(
        draw.panes(panes, size=size, caption=caption, rows=names, scale="share", side=1.05),
        arguments.out / "inside-rollout.png",
    )
    panes = [panes[0]] + [[Pane(values) for values in found[:SHOWN]] for found in colours.values()]
    caption = (
        f"The three principal components of the last patch tokens as red, green and blue, found over {COUNT} pictures of "
        "sample:fashion for each model: in a row, equal colours are equal directions."
    )
    write(draw.panes(panes, size=size, caption=caption, rows=names, side=1.05), arguments.out / "inside-colours.png")

    chosen = limit(source, 600, 0)
    features = extract(own, chosen, own.preprocess)
    where, labels = plane(features.features.numpy()), features.labels.numpy()
    near = neighbours_alike(where, labels)
    print(f"map        {OWN}: of a picture's 10 nearest, {near:.0%} are of its class")
    caption = (
        f"{len(where)} test pictures of sample:fashion by our model's features, by t-SNE: {100 * near:.0f} % of a picture's "
        "10 nearest are of its class."
    )
    write(
        draw.data_plane(where, labels, source.classes, caption),
        arguments.out / "inside-map.png",
    )


def lift(maps: np.ndarray, pictures: list[np.ndarray]) -> float:
    """The mean of the maps on patches of objects over that on all patches; these pictures are black where nothing is."""
    found = []
    for values, picture in zip(maps, pictures, strict=True):
        lit = Image.fromarray((picture.max(2) > 25).astype(np.float32)).resize(values.shape[::-1], Image.Resampling.BOX)
        weight = np.asarray(lit)
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
