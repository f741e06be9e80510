"""Token merging's curve of accuracy against speed: `python bench/merging.py dinov2s.pt imagenette-small`; --quick tries it.

At equal precision, fp32 by eager PyTorch and int8 by OpenVINO: the model with R patch tokens merged in each block, for
each R and each way that predict's --merge knows, beside the same without. Two linear heads answer. One is fitted to the
unmerged fp32 class tokens: what it loses is what a person loses who switches merging on under a finished classifier. The
other is fitted to the class tokens of the merged fp32 model, as `vitrail probe --merge R` does it. Of three parts of all
pictures each is asked by heads that were fitted to the other two. int8 is calibrated on training pictures.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import measure
import torch
from torch import Tensor

from vitrail.benchmark import alternation
from vitrail.core.types import Source
from vitrail.core.values import to_json
from vitrail.data.splits import open_data
from vitrail.data.transforms import Transform
from vitrail.evaluation.linear import Linear, linear
from vitrail.inference.engines import Engine, Setup, build, engine_cache
from vitrail.inference.features import extract
from vitrail.inference.graphs import Asked
from vitrail.inference.quantise import PICTURES, paired, quantise
from vitrail.layers.merging import Merging
from vitrail.models.vit import ViT, merge_tokens, resize_backbone
from vitrail.weights.load import load_backbone

WORDS = "blocks=1+3,by=tokens,keep=one,attention=plain"
WAYS = ["8", "12", "16", *(f"{count},{WORDS}" for count in (40, 44, 48, 52, 56))]
"""The paper's way, and those which keep a self-supervised model's answers best."""
FOLDS = 3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("data")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--merge", nargs="+", default=WAYS)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=0, help="0: a core each")
    parser.add_argument("--quick", action="store_true", help="two counts, few pictures and rounds, nothing written")
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings = parser.parse_args()
    if settings.quick:
        settings.merge, settings.rounds = ["16"], 5
    if settings.threads:
        torch.set_num_threads(settings.threads)
    splits = open_data(settings.data, validation=0.0)
    parts = [part for part in (splits.train, splits.validation, splits.test) if part is not None]
    shown = [First(part, 60) for part in parts] if settings.quick else parts
    labels = torch.cat([torch.as_tensor(part.labels) for part in shown])
    fold = torch.randint(0, FOLDS, labels.shape, generator=torch.Generator().manual_seed(0))
    backbone = load_backbone(settings.weights)
    assert isinstance(backbone, ViT)
    backbone.eval()
    resize_backbone(backbone, (settings.size, settings.size))

    def features(of: Engine | None = None) -> Tensor:
        how = {"reading": "class", "of": of, "batch": 32, "progress": True}
        found = torch.cat([extract(backbone, part, backbone.preprocess, **how).features for part in shown])
        assert len(found) == len(labels), "a picture cannot be read"
        return found

    def fitted(found: Tensor) -> list[Linear]:
        others = [fold != number for number in range(FOLDS)]
        return [linear(found[other], labels[other], len(splits.train.classes)).head for other in others]

    def right(found: Tensor, heads: list[Linear]) -> Tensor:
        answers = torch.stack([head(found).argmax(1) for head in heads])
        return answers[fold, torch.arange(len(fold))] == labels

    heads: dict[str, list[Linear]] = {}
    calibration = pixels(splits.train, backbone, PICTURES if not settings.quick else 32)
    some = pixels(splits.train, backbone, settings.batch)
    asked = Asked(backbone, "class")
    engines: dict[tuple[str, str], Engine] = {}
    hits: dict[tuple[str, str, str], Tensor] = {}
    for count in ("0", *settings.merge):
        merge_tokens(backbone, count)
        found_in = {"fp32": features()}
        heads[count] = fitted(found_in["fp32"])
        made = quantise(asked, [calibration], cache=engine_cache(), progress=True)
        streams = min(settings.batch, settings.threads or torch.get_num_threads())
        engines["int8", count] = build(
            asked,
            Setup("openvino", "int8", streams),
            batch=settings.batch,
            size=None,
            device="cpu",
            threads=settings.threads,
            quantised=made,
        )
        found_in["int8"] = features(engines["int8", count])
        for precision, seen in found_in.items():
            hits[precision, "kept", count], hits[precision, "fitted", count] = (
                right(seen, heads["0"]),
                right(seen, heads[count]),
            )

    def eager(count: str) -> None:
        merge_tokens(backbone, count)
        with torch.inference_mode():
            asked(some)

    found = []
    for precision in ("fp32", "int8"):
        sides = {
            count: (lambda count=count: eager(count))
            if precision == "fp32"
            else (lambda count=count: engines["int8", count](some))
            for count in ("0", *settings.merge)
        }
        seconds = alternation.alternate(sides, rounds=settings.rounds)
        for count in sides:
            faster = alternation.ratio(seconds["0"], seconds[count])
            line = {
                "precision": precision,
                "merge": count,
                "tokens_at_the_end": tokens_left(backbone, count),
                "times_faster": {"value": faster.value, "low": faster.low, "high": faster.high},
                "pictures_a_second": settings.batch / statistics.median(seconds[count]),
            }
            for head in ("kept", "fitted"):
                seen = hits[precision, head, count]
                lost = paired(hits[precision, head, "0"].numpy(), seen.numpy())
                line[head] = {
                    "accuracy": 100 * float(seen.float().mean()),
                    "points_lost": {"value": lost.drop, "low": lost.low, "high": lost.high, "count": lost.count},
                }
                print(
                    f"{precision} R {count}, head {head}: {line[head]['accuracy']:.2f} %, {lost.drop:+.2f} points lost "
                    f"[{lost.low:+.2f}, {lost.high:+.2f}], {faster.value:.2f} x [{faster.low:.2f}, {faster.high:.2f}]"
                )
            found.append(line)
    cheap = [line for line in found if line["precision"] == "int8" and least(line) <= 1.0]
    best = max(cheap, key=lambda line: line["times_faster"]["value"])
    print(f"int8 at most 1 point below unmerged: R {best['merge']}, {best['times_faster']['value']:.2f} x (bar 1.4)")
    if not settings.quick:
        record = {
            "weights": settings.weights.name,
            "data": splits.origin.rsplit("/", 1)[-1],
            "size": settings.size,
            "batch": settings.batch,
            "rounds": settings.rounds,
            "threads": settings.threads,
            "calibrated_on": calibration.shape[0],
            "bar": {"times_faster": 1.4, "points_lost": 1.0},
            "best": to_json(best),
            "curve": to_json(found),
        }
        measure.write("merging", record, settings.out)
    return 0 if best["times_faster"]["value"] >= 1.4 else 1


def least(line: dict[str, Any]) -> float:
    """Points lost by the better of the two heads."""
    return min(line[head]["points_lost"]["value"] for head in ("kept", "fitted"))


class First:
    """Pictures of a source spread evenly over it."""

    def __init__(self, source: Source, count: int) -> None:
        self.source = source
        self.places = [place * len(source) // count for place in range(min(count, len(source)))]
        self.classes, self.fingerprint = source.classes, f"{source.fingerprint} {count}"
        self.labels = source.labels[self.places]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int):  # type: ignore[no-untyped-def]
        return self.source[self.places[index]]


def pixels(source: Source, backbone: ViT, count: int) -> Tensor:
    """uint8 pictures spread over all classes."""
    transform, few = Transform(backbone.preprocess), First(source, count)
    return torch.stack([torch.from_numpy(transform(few[place].picture, None)) for place in range(len(few))])


def tokens_left(backbone: ViT, given: str) -> int:
    how, left = Merging.of(given), backbone.config.tokens() - backbone.config.prefixes
    for layer in range(backbone.depth - 1):  # in the last block the class token is computed alone
        left -= how.at(layer, left)
    return left + backbone.config.prefixes


if __name__ == "__main__":
    sys.exit(main())
