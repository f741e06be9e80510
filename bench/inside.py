"""What the attention maps of a picture cost: `python bench/inside.py`.

Against a forward pass with explicit attention, that is one in which every block writes its map down and multiplies by it, as
Eq. 6 and 7 are written, but keeps nothing. Ours runs the model as it is, with fused attention, computes every block's map
afterwards from what stood before it, and measures its attention distances. Both over 16 pictures of 224 x 224 pixels.

The claim is at most 1.5 times; the exit code is 1 if even the low end of the interval is above that. About 3 minutes.
"""

import argparse
import sys
from pathlib import Path

import measure
import torch

from vitrail.analysis.attention import attention_distances
from vitrail.analysis.internals import trace
from vitrail.layers.attention import attention_map
from vitrail.models.vit import ViT
from vitrail.weights import zoo

MOST = 1.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ViT-B/16")
    parser.add_argument("--pictures", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=11, help="pairs of measurements")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings = parser.parse_args()
    model = zoo.config(settings.model).build().eval().to(settings.device)
    images = torch.randn(settings.pictures, 3, *model.config.image, generator=torch.Generator().manual_seed(0))
    images = images.to(settings.device)

    def finished() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def explicit_pass() -> None:
        explicit(model, images)
        finished()

    def maps_alone() -> None:
        of = trace(model, images)
        for layer in range(of.depth):
            of.weights(layer)
        finished()

    def maps_and_distances() -> None:
        attention_distances(trace(model, images))
        finished()

    agreement = float((explicit(model, images) - trace(model, images).features.tokens).abs().max())
    found = {"model": settings.model, "pictures": settings.pictures, "device": settings.device, "difference": agreement}
    for name, ours in (("maps", maps_alone), ("maps and distances", maps_and_distances)):
        ours()
        explicit_pass()
        seconds = measure.alternate(explicit_pass, ours, settings.rounds)
        ratio = measure.median_ratio(*seconds)
        found[name] = {"ratio": ratio, "explicit": seconds[0], "ours": seconds[1]}
        print(f"{name}: {ratio['median']:.2f} times, {ratio['low']:.2f} to {ratio['high']:.2f} (at most {MOST})")
    measure.write("inside", {**found, "most": MOST}, settings.out)
    return int(found["maps"]["ratio"]["low"] > MOST)


@torch.no_grad()
def explicit(model: ViT, images: torch.Tensor) -> torch.Tensor:
    """The model's forward pass with Eq. 6 and 7 as they are written; the patch tokens at its end."""
    tokens = model.tokenize(images)
    positions = model.positions(tokens)
    x = model.encoder.enter(model.prepend(tokens.x), positions)
    for block in model.encoder.blocks:
        attention = block.attention
        query, key, value = attention.project(block.attention_norm(x), positions)
        weights = attention_map(query, key, attention.mask(query, positions))
        x = block.add_attended(x, attention.merge(weights @ value))
        x = block.add_transformed(x, block.mlp(block.mlp_norm(x)))
    return model.encoder.norm(x)[:, model.config.prefixes :]


if __name__ == "__main__":
    sys.exit(main())
