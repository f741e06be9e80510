"""Which pre-trained backbone to take when none is named: the best that is here, then what the network has, then ours.

Nothing is guessed from file names: only checkpoints that are known are taken, in the order of how well their frozen
features tell photographs apart (DINOv2, Oquab et al. 2023, table 4; AugReg, Steiner et al. 2021), small ones first, since
an answer is wanted within a minute.
"""

from dataclasses import dataclass

from vitrail.core.errors import UserError
from vitrail.weights.own import OWN, place
from vitrail.weights.remote import cached, fetch

USUAL = "official:augreg/S_16"
"""What `finetune` takes on a machine without a GPU."""

SMALL = (
    "timm:vit_small_patch14_reg4_dinov2.lvd142m",
    "hf:facebook/dinov2-with-registers-small",
    "timm:vit_small_patch14_dinov2.lvd142m",
    "hf:facebook/dinov2-small",
    USUAL,
    "timm:vit_small_patch16_224.augreg_in21k",
    "timm:vit_small_patch16_224.augreg_in21k_ft_in1k",
    "timm:vit_small_patch16_224.dino",
    "official:augreg/S_32",
    "timm:vit_tiny_patch16_224.augreg_in21k",
    "official:augreg/Ti_16",
)
LARGER = (
    "timm:vit_base_patch14_reg4_dinov2.lvd142m",
    "hf:facebook/dinov2-with-registers-base",
    "timm:vit_base_patch14_dinov2.lvd142m",
    "hf:facebook/dinov2-base",
    "official:augreg/B_16",
    "hf:google/vit-base-patch16-224-in21k",
    "official:imagenet21k/ViT-B_16",
    "hf:google/vit-base-patch16-224",
    "timm:vit_base_patch16_224.augreg_in21k",
    "official:augreg/B_32",
)


@dataclass(frozen=True)
class Found:
    """weights: what `vitrail.load_backbone` takes; None: there is nothing, train from random weights. said: why these."""

    weights: str | None
    said: str


def best_at_hand(gpu: bool) -> Found:
    """What to start from. Asks the network only where the cache has nothing."""
    for source in (*LARGER, *SMALL) if gpu else (*SMALL, *LARGER):
        if (file := cached(source)) is not None:
            return Found(str(file), f"{source}, the best that lies in the cache (--weights takes others)")
    usual = "official:augreg/B_16" if gpu else USUAL
    try:
        fetch(usual)
        return Found(
            usual, f"{usual}, AugReg's ViT of ImageNet-21k, as `vitrail finetune` takes it (--weights takes others)"
        )
    except UserError as error:
        why = str(error)
    own = own_weights()
    if own is not None:
        return Found(own, f"{own}, Vitrail's own small weights, for nothing better is at hand: {why}")
    return Found(None, f"random weights, trained from scratch, for there is nothing pre-trained at hand: {why}")


def own_weights() -> str | None:
    """The id of the weights that come with the package: made on pictures of 28 pixels, they know little of photographs. None
    in a copy of the package that lacks them."""
    return next((name for name in OWN if place(name).exists()), None)
