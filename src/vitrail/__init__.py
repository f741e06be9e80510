"""Vitrail: the Vision Transformer of "An Image is Worth 16x16 Words" (arXiv 2010.11929), to train, use and look into.

    model = vitrail.create("ViT-B/16", classes=10)    random weights
    model = vitrail.load("runs/flowers")              a trained classifier
    vitrail.fit("photos/", model="ViT-S/16")          the same as `vitrail train --data photos/ --model ViT-S/16`
    vitrail.engine(model, "auto", "bf16", batch=8)    the fastest way to run it here: a function from pictures to answers

Names are resolved on first use, so that importing vitrail imports no torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vitrail.data.transforms import read as read
    from vitrail.experiments.run import fit as fit
    from vitrail.inference.engines import engine as engine
    from vitrail.weights.load import load as load
    from vitrail.weights.load import load_backbone as load_backbone
    from vitrail.weights.native import save as save
    from vitrail.weights.zoo import create as create

_NAMES = {
    "create": "vitrail.weights.zoo",
    "engine": "vitrail.inference.engines",
    "fit": "vitrail.experiments.run",
    "load": "vitrail.weights.load",
    "load_backbone": "vitrail.weights.load",
    "read": "vitrail.data.transforms",
    "save": "vitrail.weights.native",
}
__all__ = sorted(_NAMES)


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'vitrail' has no attribute {name!r}")
    return getattr(importlib.import_module(_NAMES[name]), name)
