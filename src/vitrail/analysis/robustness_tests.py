"""The tests of "Intriguing Properties of Vision Transformers" (arXiv 2105.10497) as a list.

Each is steps of rising strength; all that is drawn at random follows from the exam's seed and the picture's number.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from jaxtyping import UInt8
from rich.progress import Progress
from torch import Tensor

from vitrail.analysis import adversarial, alterations, corruptions, textures
from vitrail.analysis.robustness import Contestant, Exam, Pixels, Step, Test
from vitrail.core.device import mix
from vitrail.core.errors import UserError


def every_test(
    exam: Exam,
    groups: Sequence[str],
    *,
    shares: Sequence[float] = alterations.SHARES,
    grids: Sequence[int] = alterations.GRIDS,
    areas: Sequence[float] = adversarial.AREAS,
    severities: Sequence[int] = (1, 2, 3, 4, 5),
    extra: bool = False,
    patch_steps: int = 150,
    target: int | None = None,
) -> list[Test]:
    """All tests of these groups that give curves. target: the class that adversarial patches are to be taken for, as the
    data number them; None: any wrong one. extra: the four corruptions that Hendrycks and Dietterich keep apart, too."""
    found: list[Test] = []
    if "drop" in groups:
        found.append(Test("random drop", "drop", "area dropped (%)", partial(_random, exam, shares), len(shares)))
        if exam.reference is not None:
            for name, pick in (
                ("salient drop", alterations.salient_cells),
                ("non-salient drop", alterations.non_salient_cells),
            ):
                found.append(Test(name, "drop", "area dropped (%)", partial(_salient, exam, shares, pick), len(shares)))
    if "shuffle" in groups:
        found.append(Test("shuffle", "shuffle", "cells a side", partial(_shuffled, exam, grids), len(grids)))
    if "texture" in groups:
        found.append(Test("texture removed", "texture", "", lambda _: texture_steps(exam.seed), 4))
    if "shape" in groups:
        found.append(Test("shape removed", "shape", "", lambda _: shape_steps(exam.seed), 2))
    if "patch" in groups:
        measured = tuple(range(1, len(exam.pixels), 2))
        for one in exam.contestants:
            made = partial(_patches, exam, one, areas, patch_steps, target)
            cost = 3 * patch_steps * 32 * len(areas)
            name = f"patch against {one.name}"
            found.append(Test(name, "patch", "area covered (%)", made, len(areas), measured, cost))
        noise = partial(_noise, exam, areas)
        found.append(Test("patch of noise", "patch", "area covered (%)", noise, len(areas), measured))
    if "corruptions" in groups:
        for name in corruptions.COMMON + (corruptions.EXTRA if extra else ()):
            steps = partial(_corrupted, exam, name, severities)
            found.append(Test(name.replace("_", " "), "corruptions", "severity", steps, len(severities)))
    return found


def texture_steps(seed: int) -> list[Step]:
    return [
        Step(1.0, "grey", lambda pixels, index: textures.levels(textures.grey_of(pixels), pixels.shape[1])),
        Step(2.0, "diffused", lambda pixels, index: textures.diffused(pixels)),
        Step(
            3.0,
            "restyled",
            lambda pixels, index: textures.outlines(pixels, index, seed, textures.SHADING),
        ),
        Step(4.0, "outlines", lambda pixels, index: textures.outlines(pixels, index, seed)),
    ]


def shape_steps(seed: int, cells: int = 8) -> list[Step]:
    return [
        Step(
            1.0,
            f"{cells} x {cells} shuffled",
            lambda pixels, index: alterations.shuffle(pixels, index, (cells, cells), seed),
        ),
        Step(2.0, "random phases", lambda pixels, index: textures.phases(pixels, index, seed)),
    ]


def _random(exam: Exam, shares: Sequence[float], _: Progress | None) -> list[Step]:
    def change(pixels: Pixels, index: list[int], share: float) -> Pixels:
        cells = alterations.random_cells(index, exam.grid, share, exam.seed)
        return alterations.drop(pixels, cells, exam.colour)

    cells = exam.grid[0] * exam.grid[1]
    return [
        Step(share, f"{100 * share:g} %", partial(change, share=share), round(share * cells) / cells)
        for share in shares
    ]


def _salient(
    exam: Exam, shares: Sequence[float], pick: Callable[[Tensor, float], Tensor], _: Progress | None
) -> list[Step]:
    def change(pixels: Pixels, index: list[int], cells: Tensor) -> Pixels:
        return alterations.drop(pixels, cells[index], exam.colour)

    chosen = [pick(exam.attention, share) for share in shares]
    return [
        Step(share, f"{100 * share:g} % of attention", partial(change, cells=cells), float(cells.float().mean()))
        for share, cells in zip(shares, chosen, strict=True)
    ]


def _shuffled(exam: Exam, grids: Sequence[int], _: Progress | None) -> list[Step]:
    def change(pixels: Pixels, index: list[int], cells: int) -> Pixels:
        return alterations.shuffle(pixels, index, (cells, cells), exam.seed)

    return [Step(float(cells), f"{cells} x {cells}", partial(change, cells=cells)) for cells in grids]


def _patches(
    exam: Exam, of: Contestant, areas: Sequence[float], steps: int, target: int | None, progress: Progress | None
) -> list[Step]:
    """Made on every other picture, from the first; measured on the rest."""
    size = (exam.pixels.shape[2], exam.pixels.shape[3])
    chosen = torch.arange(0, len(exam.pixels), 2)
    wanted = None
    if target is not None:
        found = of.labels[exam.truth == target]
        if not len(found):
            raise UserError("none of the pictures is of the class that adversarial patches are to be taken for.")
        wanted = int(found[0])
    made = []
    for area in areas:
        patch = adversarial.optimise(
            of.model,
            alterations.sized(exam.pixels[chosen], of.model.preprocess.size),
            of.labels[chosen],
            adversarial.side_of(area, of.model.preprocess.size),
            steps=steps,
            seed=exam.seed,
            target=wanted,
            progress=progress,
        )
        side = adversarial.side_of(area, size)
        made.append(_pasted(exam, area, alterations.sized(patch[None], (side, side))[0]))
    return made


def _noise(exam: Exam, areas: Sequence[float], _: Progress | None) -> list[Step]:
    size, channels = (exam.pixels.shape[2], exam.pixels.shape[3]), exam.pixels.shape[1]
    sides = [adversarial.side_of(area, size) for area in areas]
    return [
        _pasted(exam, area, adversarial.noise_patch(side, channels, exam.seed))
        for area, side in zip(areas, sides, strict=True)
    ]


def _pasted(exam: Exam, area: float, patch: UInt8[Tensor, "c p p"]) -> Step:
    size, side = (exam.pixels.shape[2], exam.pixels.shape[3]), patch.shape[1]

    def change(pixels: Pixels, index: list[int]) -> Pixels:
        where = adversarial.places(index, side, size, mix("measured", exam.seed))
        return adversarial.paste(pixels, patch, where)

    return Step(area, f"{side} x {side} pixels", change, side * side / (size[0] * size[1]))


def _corrupted(exam: Exam, name: str, severities: Sequence[int], _: Progress | None) -> list[Step]:
    def change(pixels: Pixels, index: list[int], severity: int) -> Pixels:
        done = [
            corruptions.CORRUPTIONS[name](
                picture.permute(1, 2, 0).numpy(),
                severity,
                np.random.default_rng(mix("corruption", name, severity, exam.seed, place)),
            )
            for picture, place in zip(pixels, index, strict=True)
        ]
        return torch.from_numpy(np.stack(done)).permute(0, 3, 1, 2).contiguous()

    return [Step(float(s), f"severity {s}", partial(change, severity=s)) for s in severities]
