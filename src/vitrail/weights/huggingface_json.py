"""A Hugging Face folder's two JSON files, both ways: labels and activation of config.json, and preprocessor_config.json.

The many image processors of transformers are three steps: a resize to an exact pair or of the shorter side, a central
crop or none, and a normalisation, whose rescaling is Vitrail's own 1 / 255.
"""

import re
from dataclasses import replace
from typing import Any

from vitrail.core.errors import UserError
from vitrail.core.types import Interpolation, Preprocess
from vitrail.models.vit import ViTConfig
from vitrail.weights.huggingface_names import Family
from vitrail.weights.looks import assumed, fitted
from vitrail.weights.parts import Findings, Size

FILE = "preprocessor_config.json"

RESAMPLE: dict[int, Interpolation] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box"}
"""Pillow's numbers."""


def read_preprocess(
    data: dict[str, Any] | None, kind: str, family: Family, config: ViTConfig, findings: Findings
) -> tuple[Preprocess, str]:
    """The preprocessing, and where it is from; findings.notes tell what of it cannot be kept."""
    if data is None:
        image, longer = config.image, family.enlarged
        looks = assumed(image, family.normalisation, family.interpolation, longer, config.channels)
        if family.square and longer is not None:
            looks = replace(looks, resize=(int(image[0] * longer), int(image[1] * longer)))
        return looks, f"assumed: there is no {FILE}, and this is what {kind} models are published with"
    try:
        looks = _stated(data, family, config, findings.notes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{FILE} does not have the form that transformers writes ({error}): copy it again") from error
    return fitted(looks, config, findings.notes), f"stated in {FILE}"


def _stated(data: dict[str, Any], family: Family, config: ViTConfig, notes: list[str]) -> Preprocess:
    channels, image = config.channels, config.image
    shorter, exact = _size(data.get("size"), family.square)
    crop = _size(data.get("crop_size"), True)[1]
    if not data.get("do_center_crop", crop is not None):
        crop = None
    if not data.get("do_resize", True):
        shorter, exact = None, None
        notes.append(f"{FILE} resizes nothing; here pictures are resized to {image[0]} x {image[1]}")
    resize: int | Size | None
    if crop is not None:
        before = shorter or exact
        size, resize = crop, None if before == crop else before
    elif shorter is not None:
        size, resize = (shorter, shorter), shorter
        notes.append(f"{FILE} keeps the aspect and crops nothing; here the middle {shorter} pixels are taken")
    else:
        size, resize = exact or image, None
    code = data.get("resample")
    interpolation = family.interpolation if code is None else RESAMPLE[int(code)]
    mean, deviation = (
        [float(value) for value in values] if isinstance(values, list) else [float(values)]
        for values in (
            data.get("image_mean", list(family.normalisation[0])),
            data.get("image_std", list(family.normalisation[1])),
        )
    )
    if not data.get("do_normalize", True):
        mean, deviation = [0.0], [1.0]
    # Theirs: pixels * factor, minus mean, over deviation. Ours: pixels / 255 first.
    scale = 255 * float(data.get("rescale_factor", 1 / 255)) if data.get("do_rescale", True) else 255.0
    if abs(scale - 1) > 1e-6:
        mean, deviation = [value / scale for value in mean], [value / scale for value in deviation]
    if len(mean) == 1:
        mean, deviation = mean * channels, deviation * channels
    if len(mean) != channels or len(deviation) != channels:
        raise ValueError(f"{len(mean)} means for {channels} channels")
    return Preprocess(size, resize, interpolation, tuple(mean), tuple(deviation))


def _size(value: Any, square: bool) -> tuple[int | None, Size | None]:
    """(shorter side, None) or (None, (height, width)); neither where nothing is said."""
    if value is None:
        return None, None
    if isinstance(value, int):
        return (None, (value, value)) if square else (value, None)
    if isinstance(value, list | tuple):
        return None, (int(value[0]), int(value[1]))
    if "shortest_edge" in value:
        return int(value["shortest_edge"]), None
    return None, (int(value["height"]), int(value["width"]))


def write_preprocess(preprocess: Preprocess) -> dict[str, Any]:
    """For the image processor of transformers whose three steps they are."""
    size, resize = preprocess.size, preprocess.resize
    crop = {"height": size[0], "width": size[1]}
    if resize is None:
        kind, before = "ViTImageProcessor", crop
    elif isinstance(resize, int):
        kind, before = "BitImageProcessor", {"shortest_edge": resize}
    else:
        kind, before = "DeiTImageProcessor", {"height": resize[0], "width": resize[1]}
    data: dict[str, Any] = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": before,
        "resample": next(code for code, name in RESAMPLE.items() if name == preprocess.interpolation),
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.deviation),
    }
    return data if resize is None else data | {"do_center_crop": True, "crop_size": crop}


def read_labels(config: dict[str, Any], classes: int) -> tuple[str, ...]:
    """id2label in order; nothing where it is only numbered, or is not for so many classes."""
    table = config.get("id2label")
    if not isinstance(table, dict) or {str(key) for key in table} != {str(number) for number in range(classes)}:
        return ()
    labels = tuple(str(table[key]) for key in sorted(table, key=int))
    return () if all(re.fullmatch(r"LABEL_\d+", label) for label in labels) else labels


def write_labels(labels: tuple[str, ...], classes: int) -> dict[str, Any]:
    names = labels or tuple(f"LABEL_{number}" for number in range(classes))
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": {name: number for number, name in enumerate(names)},
    }
