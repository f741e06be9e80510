"""ViT-S/16 on ImageNet as google-research/big_vision trains it (configs/vit_s16_i1k.py): 76.5 % after 90 epochs there.

`vitrail run examples/vit_s16_imagenet.py --data imagenet:PATH`. A recipe of the paper is a value to begin from: here
ViT-B/16's of Table 3, with another model, head, loss and length, and AugReg's level light2.
"""

from vitrail.experiments.paper import augreg
from vitrail.experiments.paper_names import cell
from vitrail.experiments.recipe import with_settings

CHANGES = {
    **{"model": "ViT-S/16", "pool": "mean", "positions": "sincos2d", "dropout": 0.0},
    **{"representation": 384, "head_bias": 0.0, "loss": "softmax"},
    **{"batch": 1024, "epochs": 90.0, "rate": 0.001, "weight_decay": 0.0001, "decay": "decoupled"},
}

recipe = augreg(with_settings(cell("vit-b16-imagenet").recipe, CHANGES, "vit_s16_imagenet.py"), "light2")
