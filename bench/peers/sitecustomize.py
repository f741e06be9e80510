"""Lets torchvision be imported beside a CPU build of torch: put this folder on PYTHONPATH (README.md).

The registry's torchvision is built against CUDA; without that its operators are never registered, and its import ends at
the first one that it describes. timm imports torchvision for a few names and calls none of these operators, so they are
only declared here. For measuring alone: nothing in src/ or tests/ reads it.
"""

import importlib.util

if importlib.util.find_spec("torchvision") is not None:
    import torch

    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
