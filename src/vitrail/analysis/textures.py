"""Texture taken away and shape kept, and the other way round; and how the data show that it is so.

The paper (arXiv 2105.10497, section 3.2) uses pictures restyled by a network (Geirhos et al., arXiv 1811.12231), which need
a download. Here are ways that need none:

- "diffused": Perona and Malik's anisotropic diffusion (1990, their first conductance), in grey. What is inside of regions
  is smoothed, their edges stay. Mild: what is left is a picture that a person knows.
- "restyled" and "outlines": as Geirhos et al. do, each picture's texture gives way to one that says nothing: fine noise,
  whose contrast at each place follows the rank of the original's edge energy there. Such contrast-defined pictures are
  Chubb and Sperling's (1988). Outlines differ in where their edges are and in little that a small window could see: all
  have one grey, no colour, two levels at a place, and contrasts roughened until they change as much from place to place
  in each, down and across alike, and half levelled between sides; how strong the noise is and which contrasts there are
  is drawn anew for each, as a style is. Restyled pictures keep some of the diffused picture below the noise, so that
  there is shading to go by.

Shape goes, texture stays: "phases" gives each picture's Fourier transform one set of random phases (Galerne, Gousseau and
Morel 2011, random phase textures): spectrum and colours' correlations stay, whatever has a place is gone.

Whether texture is gone is asked of `LocalClassifier`; whether shape is there, of `edge_correlation`.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor

from vitrail.core.device import mix
from vitrail.evaluation.linear import PENALTIES, Design, stratified

Pixels = UInt8[Tensor, "b c h w"]
SHADING = 20.0
"""Of restyled pictures: the deviation of the diffused picture's grey levels."""
CARRIER = 10.0, 40.0
"""Of outlines: the least and the largest mean deviation of the noise, in grey levels; logarithms are drawn evenly."""
SPREAD = 1.4, 2.3
"""Likewise the shape of the Weibull distribution that contrasts have. Edge energies of CIFAR-10 have 1.7."""
WIDTHS = (1.5, 2, 3, 4)
"""In 32nds of the shorter side: deviations of the Gaussians that make outlines wider, the first to leave room."""
ROUGHNESS = 0.03
"""What contrasts are roughened to, down and across alike: the mean squared step from a place to the next one, a 32nd of the
side away, over the square of the mean contrast. CIFAR-10's edge energies have 0.01 to 0.03 of their own."""
TILT = 0.5
"""How much is kept of what contrasts differ by between top and bottom, left and right: that is the sum of the steps between,
which windows see. To level all of it costs edges (a correlation of 0.85 for 0.93), half of it little (0.91)."""
GRAIN = 1.5
"""In 32nds of the shorter side: how far what roughens down or across goes on across or down; a Gaussian's deviation."""
OBJECT_SCALE = 1 / 16
"""Of a picture's shorter side: the deviation of the Gaussian over which edge energy is summed up. 2 pixels of 32."""


def diffused(pixels: UInt8[Tensor, "b c h w"], steps: int = 20) -> UInt8[Tensor, "b c h w"]:
    """Perona-Malik: dI/dt = div(g(|grad I|) grad I), g(s) = exp(-(s / k)^2), in `steps` steps of 0.2 for pictures of 32
    pixels; of larger ones more, as the square of their size. k is half the deviation of the picture's grey levels."""
    grey = grey_of(pixels)
    k = 0.5 * grey.std((1, 2, 3), keepdim=True).clamp(min=2)
    # Larger steps of one diffusion would be unstable; beyond 20 times as many nothing is seen to change.
    for _ in range(min(round(steps * (min(pixels.shape[2:]) / 32) ** 2), 20 * steps)):
        down, across = grey[:, :, 1:] - grey[:, :, :-1], grey[..., 1:] - grey[..., :-1]
        down, across = down * torch.exp(-((down / k) ** 2)), across * torch.exp(-((across / k) ** 2))
        flow = F.pad(down, (0, 0, 0, 1)) - F.pad(down, (0, 0, 1, 0)) + F.pad(across, (0, 1)) - F.pad(across, (1, 0))
        grey = grey + 0.2 * flow
    return levels(grey, pixels.shape[1])


def outlines(
    pixels: UInt8[Tensor, "b c h w"], index: Sequence[int], seed: int, shading: float = 0.0
) -> UInt8[Tensor, "b c h w"]:
    """Noise whose contrast at each place follows the rank of the edge energy there.

    shading: the deviation, in grey levels, of the diffused picture below it; 0 for one even grey.
    """
    height, width = pixels.shape[2:]
    drawn = np.stack([np.random.default_rng(mix("style", seed, place)).random(2) for place in index])
    spread = torch.from_numpy(SPREAD[0] + (SPREAD[1] - SPREAD[0]) * drawn[:, :1])
    carrier = torch.from_numpy(CARRIER[0] * (CARRIER[1] / CARRIER[0]) ** drawn[:, 1]).float().view(-1, 1, 1, 1)
    contrast = _contrasts(height * width, spread).gather(1, _ranks(pixels, index, seed)).view(-1, 1, height, width)
    noise = torch.stack([_noise((height, width), mix("outlines", seed, place)) for place in index])
    # Noise is by chance rougher at some places than at others; what it has of edges itself is taken out.
    contrast = contrast / blurred(_slope(noise), min(height, width) / 32)
    contrast = contrast / contrast.mean((1, 2, 3), keepdim=True)
    below = torch.full_like(noise, 128)
    if shading:
        shape = diffused(pixels)[:, :1].float()
        shape = shape - shape.mean((1, 2, 3), keepdim=True)
        below = 128 + shading * shape / shape.std((1, 2, 3), keepdim=True).clamp(min=1)
    return levels(below + carrier * contrast * noise, pixels.shape[1])


def _contrasts(count: int, spread: Float[Tensor, "b one"]) -> Float[Tensor, "b count"]:
    """Quantiles of Weibull's distribution of these shapes, of mean 1."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    found = ((-torch.log1p(-share)) ** (1 / spread)).float()
    return found / found.mean(1, keepdim=True)


def _ranks(pixels: UInt8[Tensor, "b c h w"], index: Sequence[int], seed: int) -> Int[Tensor, "b places"]:
    """Of each place's edge energy in its picture, smoothed, roughened to `ROUGHNESS` and levelled to `TILT`."""
    size = pixels.shape[2], pixels.shape[3]
    unit = min(size) / 32
    energy = edge_energy(pixels)
    # Places without any edge are equal; they are ranked by something as smooth, and not by where they stand.
    field = torch.stack([_white(size, mix("ties", seed, place)) for place in index])
    field = blurred(field, OBJECT_SCALE * min(size))
    energy = energy + 0.01 * energy.mean((1, 2, 3), keepdim=True).clamp(min=1e-3) / field.std() * field
    contrasts = _contrasts(math.prod(size), torch.full((len(pixels), 1), sum(SPREAD) / 2, dtype=torch.float64))

    def ranked(field: Float[Tensor, "b 1 h w"]) -> tuple[Int[Tensor, "b places"], Float[Tensor, "b 1 h w"]]:
        ranks = field.flatten(1).argsort(1).argsort(1)
        return ranks, contrasts.gather(1, ranks).view(-1, 1, *size)

    def steps(at: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "two b 1 1 1"]:
        return unit**2 * torch.stack([at.diff(dim=axis).square().mean((1, 2, 3), keepdim=True) for axis in (2, 3)])

    def tilted(at: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "two b 1 1 1"]:
        ends = [
            at.narrow(axis, at.shape[axis] - 1, 1).mean((2, 3)) - at.narrow(axis, 0, 1).mean((2, 3)) for axis in (2, 3)
        ]
        return torch.stack(ends)[..., None, None]

    smooth = torch.zeros_like(energy)
    rough = torch.ones(len(pixels), dtype=torch.bool)
    for wide in WIDTHS:
        if not rough.any():
            break
        smooth[rough] = blurred(energy[rough], wide * unit)
        rough = steps(ranked(smooth)[1]).amax(0).flatten() > ROUGHNESS
    own = ranked(smooth)[1]
    grain = torch.stack(
        [torch.stack([_grain(size, axis, mix("grain", seed, place, axis)) for place in index]) for axis in (0, 1)]
    )
    strength = torch.full((2, len(pixels), 1, 1, 1), ROUGHNESS / 4)
    ramps = torch.stack(torch.meshgrid(*(torch.linspace(-0.5, 0.5, length) for length in size), indexing="ij"))
    ramps = ramps.view(2, 1, 1, *size)
    tilt, kept = torch.zeros(2, len(pixels), 1, 1, 1), TILT * tilted(own)
    for _ in range(10):
        ranks, at = ranked(own + (strength.sqrt() * grain).sum(0) - (tilt * ramps).sum(0))
        # White noise of variance s has squared steps of 2 s.
        strength = (strength + (ROUGHNESS - steps(at)) / 2).clamp(min=0)
        tilt = tilt + tilted(at) - kept
    return ranks


def _grain(size: tuple[int, int], axis: int, seed: int) -> Float[Tensor, "1 h w"]:
    """Noise of variance 1, along one axis white to a 32nd of the shorter side, smooth along the other."""
    coarse = tuple(max(2, round(32 * length / min(size))) for length in size)
    white = blurred(_white(coarse, seed)[None], GRAIN, axes=(3 - axis,))
    white = F.interpolate(white, size, mode="bilinear")[0]
    return (white - white.mean()) / white.std()


def phases(pixels: UInt8[Tensor, "b c h w"], index: Sequence[int], seed: int) -> UInt8[Tensor, "b c h w"]:
    """Every picture with the phases of noise added to its own, the same for all its channels."""
    x = pixels.float()
    noise = torch.stack([_white(tuple(x.shape[2:]), mix("phases", seed, place)) for place in index])
    turn = torch.fft.rfft2(noise)
    turn = turn / turn.abs().clamp(min=1e-12)
    turn[..., 0, 0] = 1  # the mean colour stays
    return torch.fft.irfft2(torch.fft.rfft2(x) * turn, s=x.shape[2:]).round().clamp(0, 255).to(torch.uint8)


def edge_energy(pixels: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Where edges lie, at the scale of objects: Sobel's gradient magnitude of the grey picture, then a Gaussian of
    `OBJECT_SCALE` of the shorter side over it."""
    return blurred(_slope(grey_of(pixels)), OBJECT_SCALE * min(pixels.shape[2:]))


def _slope(grey: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 1 h w"]:
    """Sobel's gradient magnitude, in levels a pixel."""
    grey = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
    across, down = (F.conv2d(grey, k.contiguous()[None, None]) for k in (kernel, kernel.T))
    return (across.square() + down.square()).sqrt()


def edge_correlation(before: UInt8[Tensor, "b c h w"], after: UInt8[Tensor, "b c h w"]) -> Float[np.ndarray, "b"]:
    """Pearson's correlation, over each picture's pixels, of the two edge energies; nan where one has no edges."""
    maps = [edge_energy(pixels).flatten(1).double() for pixels in (before, after)]
    maps = [m - m.mean(1, keepdim=True) for m in maps]
    return ((maps[0] * maps[1]).sum(1) / (maps[0].norm(dim=1) * maps[1].norm(dim=1))).numpy()


def grey_of(pixels: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b 1 h w"]:
    """Luma (ITU-R 601) of three channels, the mean of any other number."""
    weights = (0.299, 0.587, 0.114) if pixels.shape[1] == 3 else (1 / pixels.shape[1],) * pixels.shape[1]
    return (pixels.float() * torch.tensor(weights).view(1, -1, 1, 1)).sum(1, keepdim=True)


def blurred(x: Float[Tensor, "b c h w"], sigma: float, axes: Sequence[int] = (2, 3)) -> Float[Tensor, "b c h w"]:
    """A Gaussian along these axes, cut off at 3 deviations; beyond the border the outermost pixels go on."""
    for axis in axes:
        reach = max(1, min(math.ceil(3 * sigma), x.shape[axis] - 1))
        steps = torch.arange(-reach, reach + 1, dtype=x.dtype)
        kernel = torch.exp(-(steps**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).expand(x.shape[1], 1, 1, -1)
        kernel, padding = (kernel, (reach, reach, 0, 0)) if axis == 3 else (kernel.mT, (0, 0, reach, reach))
        x = F.conv2d(F.pad(x, padding, mode="replicate"), kernel, groups=x.shape[1])
    return x


class LocalClassifier:
    """Recognises pictures from small windows alone, wherever they lie: a bag of local features, like BagNets (Brendel and
    Bethge 2019) but solved. Windows of a tenth of the side (of 32 pixels 3, with
    which more originals are recognised than with 5) are whitened and compared with `count` of their kind
    (Coates and Ng 2011, soft threshold); mean and root mean square of each answer over the picture go into a ridge, whose
    penalty is chosen on a fifth of the pictures.
    """

    def __init__(
        self, pixels: UInt8[Tensor, "b c h w"], labels: Int[Tensor, "b"], classes: int, count: int = 64, seed: int = 0
    ) -> None:
        side = min(pixels.shape[2:])
        self.window = max(3, round(side / 10))
        self.step = max(1, self.window // 2)
        random = torch.Generator().manual_seed(mix("windows", seed))
        some = pixels[torch.randperm(len(pixels), generator=random)[:500]]
        bag = torch.cat([self._windows(part) for part in some.split(50)])
        windows = bag[torch.randperm(len(bag), generator=random)[:4000]]
        self.mean = windows.mean(0)
        values, vectors = torch.linalg.eigh(torch.cov((windows - self.mean).T).double())
        # The hundred directions of most variance: what is left of large windows is noise.
        values, vectors = values[-100:], vectors[:, -100:]
        self.whiten = (vectors / (values + 1e-3).sqrt()).float()
        kinds = ((windows - self.mean) @ self.whiten)[:count]
        self.kinds = kinds / kinds.norm(dim=1, keepdim=True).clamp(min=1e-6)
        features, held = self._features(pixels), stratified(labels, 5, seed) == 0

        def right(penalty: float) -> int:
            head = design.ridge(labels[~held], classes, penalty)
            return int((head(features[held]).argmax(1) == labels[held]).sum())

        design = Design(features[~held])
        self.head = Design(features).ridge(labels, classes, max(PENALTIES["ridge"], key=right))

    def right(self, pixels: UInt8[Tensor, "b c h w"], labels: Int[Tensor, "b"]) -> np.ndarray:
        """(b,) bool: whether each picture is recognised."""
        return (self.head(self._features(pixels)).argmax(1) == labels).numpy()

    def _windows(self, pixels: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "all values"]:
        cut = F.unfold(pixels.float() / 255, self.window, stride=self.step)
        return cut.transpose(1, 2).flatten(0, 1)

    def _features(self, pixels: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b features"]:
        found = []
        for part in pixels.split(32):
            answers = ((self._windows(part) - self.mean) @ self.whiten) @ self.kinds.T
            both = torch.cat([F.relu(answers - 0.5), F.relu(-answers - 0.5)], 1).unflatten(0, (len(part), -1))
            found.append(torch.cat([both.mean(1), (both.square().mean(1) + 1e-9).sqrt()], 1))
        return torch.cat(found)


def in_parts(
    change: Callable[[Pixels, list[int]], Pixels], pixels: UInt8[Tensor, "n c h w"], first: int = 0, size: int = 64
) -> UInt8[Tensor, "n c h w"]:
    """An alteration of all pictures, some at a time; their places are counted from `first`."""
    parts = [
        change(part, list(range(first + size * number, first + size * number + len(part))))
        for number, part in enumerate(pixels.split(size))
    ]
    return torch.cat(parts)


def _white(size: tuple[int, ...], seed: int) -> Float[Tensor, "1 h w"]:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((1, *size), np.float32))


def _noise(size: tuple[int, int], seed: int) -> Float[Tensor, "1 h w"]:
    """Fine noise of -1 and 1: the sign of white noise without what a Gaussian of a 32nd of the side would leave of it."""
    white = _white(size, seed)
    return (white - blurred(white[None], min(size) / 32)[0]).sign()


def levels(grey: Float[Tensor, "b 1 h w"], channels: int) -> UInt8[Tensor, "b c h w"]:
    return grey.round().clamp(0, 255).to(torch.uint8).expand(-1, channels, -1, -1).contiguous()
