"""What the first layer looks for: principal components of its filters, Fig. 7 (left)."""

import numpy as np
import torch
from jaxtyping import Float

from vitrail.analysis.internals import Model
from vitrail.models.classifier import Classifier
from vitrail.models.resnet import ResNet


@torch.no_grad()
def filter_components(model: Model, count: int = 28) -> tuple[Float[np.ndarray, "k c h w"], Float[np.ndarray, "all"]]:
    """The first `count` (or as many as there are) principal components, and the share of the variance that each explains.

    The d filters of the patch embedding E are d samples of c x h x w numbers; their mean is taken off first. The shares are
    of all components, fall, and sum to 1. A component's sign means nothing; its largest number is made positive. A hybrid's
    or ResNet's filters are those of its root, 7 x 7 pixels, as they are stored.
    """
    backbone = model.backbone if isinstance(model, Classifier) else model
    if isinstance(backbone, ResNet):
        kernel = backbone.root.weight
    else:
        kernel = backbone.patch_embedding.weight if backbone.trunk is None else backbone.trunk.root.weight
    samples = kernel.flatten(1).double().cpu().numpy()
    components, shares = principal(samples, count)
    return components.reshape(-1, *kernel.shape[1:]), shares


def principal(
    samples: Float[np.ndarray, "samples numbers"], count: int
) -> tuple[Float[np.ndarray, "k numbers"], Float[np.ndarray, "all"]]:
    """Unit principal axes of samples, the first `count`; and each axis's share of the variance."""
    _, sizes, axes = np.linalg.svd(samples - samples.mean(0), full_matrices=False)
    axes = axes[:count]
    largest = np.abs(axes).argmax(1)
    axes = axes * np.sign(axes[np.arange(len(axes)), largest])[:, None]
    variance = sizes**2
    return axes, variance / max(variance.sum(), np.finfo(float).tiny)
