"""Universal adversarial patches: one square that, wherever it lies, makes a model wrong on any picture.

"Adversarial Patch" (Brown et al. 2017, arXiv 1712.09665): the expected loss over pictures and over transformations of the
patch is raised by gradient steps; here the transformations are a random place and a random quarter turn (Brown et al.
also scale; here each size is a patch of its own). Untargeted: the loss of the true class is raised; targeted: that of
the wanted class is lowered. Pixels stay in 0..255, so that the patch could be printed.
"""

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from rich.progress import Progress
from torch import Tensor

from vitrail.analysis.internals import evaluating
from vitrail.core.device import mix
from vitrail.models.classifier import Classifier

AREAS = (0.02, 0.05, 0.1, 0.2)
"""Shares of the picture's area that a patch covers."""


def side_of(area: float, size: tuple[int, int]) -> int:
    """Pixels a side of a square patch that covers `area` of a picture of `size`; at least 1."""
    return min(max(1, round((area * size[0] * size[1]) ** 0.5)), *size)


def places(index: list[int], side: int, size: tuple[int, int], seed: int) -> Int[Tensor, "b 3"]:
    """Top, left and quarter turns for each picture, drawn from the seed and its place in the source."""
    drawn = []
    for place in index:
        random = np.random.default_rng(mix("patch", seed, place))
        drawn.append([random.integers(size[0] - side + 1), random.integers(size[1] - side + 1), random.integers(4)])
    return torch.tensor(np.array(drawn, np.int64).reshape(-1, 3))


def paste(
    images: Shaped[Tensor, "b c h w"], patch: Shaped[Tensor, "c p p"], where: Int[Tensor, "b 3"]
) -> Shaped[Tensor, "b c h w"]:
    """The pictures with the patch on them; differentiable by the patch."""
    side = patch.shape[1]
    turned = torch.stack([torch.rot90(patch, turns, (1, 2)) for turns in range(4)])[where[:, 2].to(patch.device)]
    steps = torch.arange(side, device=images.device)
    where = where.to(images.device)
    rows = (where[:, :1] + steps)[:, None, :, None]
    columns = (where[:, 1:2] + steps)[:, None, None, :]
    numbers = torch.arange(images.shape[0], device=images.device)[:, None, None, None]
    channels = torch.arange(images.shape[1], device=images.device)[None, :, None, None]
    return images.index_put((numbers, channels, rows, columns), turned)


def noise_patch(side: int, channels: int, seed: int) -> UInt8[Tensor, "c p p"]:
    """A patch that nothing was done to: what covering as much of the picture costs by itself."""
    random = np.random.default_rng(mix("noise patch", seed, side))
    return torch.from_numpy(random.integers(0, 256, (channels, side, side), dtype=np.uint8))


def optimise(
    model: Classifier,
    pixels: UInt8[Tensor, "n c h w"],
    labels: Int[Tensor, "n"],
    side: int,
    *,
    steps: int = 150,
    batch: int = 32,
    rate: float = 0.05,
    seed: int = 0,
    target: int | None = None,
    progress: Progress | None = None,
) -> UInt8[Tensor, "c p p"]:
    """The patch after `steps` steps of Adam on random batches.

    pixels, labels: the pictures it is made on. rate: of Adam, for colours in [0, 1]; falls to 0 along a cosine.
    target: the class to be answered; None: any but the true one.
    """
    device = next(model.parameters()).device
    random = np.random.default_rng(mix("optimise", seed, side))
    size, mean, deviation = (pixels.shape[2], pixels.shape[3]), *_colours(model, device)
    patch = (noise_patch(side, pixels.shape[1], seed).float() / 255).to(device).requires_grad_()
    adam = torch.optim.Adam([patch], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    task = None if progress is None else progress.add_task(f"patch of {side} pixels", total=steps)
    with evaluating(model), torch.enable_grad():
        for step in range(steps):
            chosen = torch.from_numpy(random.choice(len(pixels), min(batch, len(pixels)), replace=False))
            where = places(chosen.tolist(), side, size, mix(seed, step))
            images = paste(model.preprocess.normalize(pixels[chosen].to(device)), (patch - mean) / deviation, where)
            wanted = labels[chosen] if target is None else torch.full_like(labels[chosen], target)
            loss = F.cross_entropy(model(images).float(), wanted.to(device))
            (gradient,) = torch.autograd.grad(-loss if target is None else loss, patch)
            patch.grad = gradient
            adam.step()
            schedule.step()
            with torch.no_grad():
                patch.clamp_(0, 1)
            if progress is not None and task is not None:
                progress.advance(task)
    if progress is not None and task is not None:
        progress.remove_task(task)
    return (255 * patch.detach()).round().to(torch.uint8).cpu()


def _colours(model: Classifier, device: torch.device) -> tuple[Float[Tensor, "c 1 1"], Float[Tensor, "c 1 1"]]:
    of = model.preprocess
    return (
        torch.tensor(of.mean, device=device).view(-1, 1, 1),
        torch.tensor(of.deviation, device=device).view(-1, 1, 1),
    )
