"""A model as a file for other runtimes: OpenVINO, ONNX, or torch.export's own.

Unusual: what was written is read back and run on real pictures beside the model, and a file that gives other answers does
not stay. It is made in a folder beside its place, so that an older file there is lost to no failure.
"""

import copy
import json
import math
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.types import Source
from vitrail.core.values import to_json
from vitrail.data.sources import read_sample
from vitrail.inference.agreement import Agreement, agreement, allowed, pictures
from vitrail.inference.features import merging
from vitrail.inference.graphs import (
    Asked,
    converted,
    evaluating,
    import_openvino,
    needed,
    onnx_model,
    openvino_core,
    quiet,
    taking_pixels,
    traced,
)
from vitrail.inference.openvino import EnginePrecision, OpenVino, Setup
from vitrail.layers.patches import check_size
from vitrail.models.classifier import Classifier
from vitrail.models.resnet import ResNet, stage_stride
from vitrail.models.vit import ViT

Target = Literal["openvino", "onnx", "torch-export"]
Size = tuple[int, int]
SUFFIXES = {"openvino": ".xml", "onnx": ".onnx", "torch-export": ".pt2"}
KEY = "vitrail"
"""Of the metadata, which are JSON: in OpenVINO's rt_info, ONNX's metadata_props, torch.export's extra_files."""
FORMAT = 1
COMPARED = 4
"""Pictures on which a file is compared with the model, at each size."""


@dataclass(frozen=True)
class Exported:
    """What was written. agreements: with the model, at each size (height, width) that was tried."""

    path: Path
    metadata: dict[str, Any]
    agreements: dict[Size, Agreement]


class Halved(Asked):
    """All in bf16, but for pictures and answers."""

    def __init__(self, model: Asked) -> None:
        super().__init__(copy.deepcopy(model.model).to(torch.bfloat16), model.reading, model.preprocess)

    def forward(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        normal = self.preprocess.normalize(images) if images.dtype == torch.uint8 else images
        return self.ask(normal.to(torch.bfloat16)).float()


def export(
    model: Asked,
    target: Target,
    path: Path,
    *,
    sizes: Sequence[Size] | None = (),
    pixels: bool = False,
    precision: EnginePrecision = "fp32",
    source: Source | None = None,
    quantised: Any = None,
    tolerance: float | None = None,
) -> Exported:
    """Writes `path`, which takes any number of pictures at a time.

    sizes: (height, width) each: none is the model's own, one is that alone; several, or any (None), make a file that takes
        every multiple of the patch, from two patches each way.
    pixels: uint8 goes in, and is normalised inside; else normalised fp32.
    source: pictures to compare on; None is the embedded sample. quantised: of inference/quantise.py, for int8.
    tolerance: the largest difference that passes, as a share of the largest answer; None is `agreement.TOLERANCES`.

    Raises UserError where the target does not have that precision or the model not those sizes, where a package is
    missing, and where the file gives other answers than the model: it is then removed.
    """
    check(model, target, path, sizes, precision, quantised)
    own = model.preprocess.size
    free = sizes is None or len(sizes) > 1
    size = own if sizes is None or not sizes else sizes[0]
    metadata = described(model, sizes if sizes is None or sizes else (own,), pixels, precision)
    folder = path.parent / f".{path.name}.{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True)
        made = folder / path.name
        run = WRITERS[target](model, made, size, free, pixels, precision, quantised, json.dumps(metadata))
        agreements = {}
        for tried in tried_sizes(model, sizes):
            images = pictures(source or read_sample("fashion", "test"), model.preprocess, COMPARED, tried)
            with evaluating(model):
                wanted = model(images)
            given = images if pixels else model.preprocess.normalize(images)
            # In two calls: another number of pictures must do as well.
            found = torch.cat([run(given[:1]), *([run(given[1:])] if len(given) > 1 else [])])
            most = allowed(model, precision) if tolerance is None else tolerance
            agreements[tried] = agreement(wanted, found, most)
            if not agreements[tried].passed:
                raise UserError(
                    f"{path} would give other answers than the model at {tried[0]} x {tried[1]} "
                    f"({agreements[tried].said}; {most:g} of the largest is allowed), so it was removed; "
                    "give another --precision or target."
                )
        for file in sorted(folder.iterdir(), key=lambda file: file == made):
            file.replace(path.with_name(file.name))
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error}); give another place.") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return Exported(path, metadata, agreements)


def check(
    model: Asked, target: Target, path: Path, sizes: Sequence[Size] | None, precision: EnginePrecision, quantised: Any
) -> None:
    """Raises UserError on what cannot be had, before any work."""
    if path.suffix != SUFFIXES[target]:
        raise UserError(f"{path} is no name for {target}; give one that ends in {SUFFIXES[target]}.")
    if precision == "int8" and (target != "openvino" or quantised is None):
        raise UserError(
            f"int8 is made for openvino, calibrated on pictures; {target} has none here: give --to openvino and --calibrate."
        )
    if precision == "bf16" and target == "openvino":
        raise UserError(
            "an OpenVINO file has no bf16 of its own, whoever runs it chooses (INFERENCE_PRECISION_HINT=bf16); give "
            "--precision fp32."
        )
    if precision == "bf16" and target == "onnx":
        raise UserError("ONNX Runtime has no bf16 products on a CPU; give --precision fp32, or --to torch-export.")
    backbone = model.backbone
    if sizes is None or len(sizes) > 1:
        why = ""
        if precision == "int8":
            why = "its int8 is calibrated at one size"
        elif merging(model.model):
            why = "how many tokens are merged depends on it"
        elif isinstance(backbone, ViT) and backbone.config.positions == "relative":
            why = "its relative positions are a table of all pairs of places"
        if why:
            raise UserError(
                f"this model cannot be exported for several sizes in one file ({why}); give one of --sizes."
            )
    for size in sizes or ():
        check_size(size, steps(model))
        if len(sizes or ()) > 1 and any(length < 2 * step for length, step in zip(size, steps(model), strict=True)):
            raise UserError(
                f"{size[0]} x {size[1]} is less than two patches each way; give larger --sizes, or it alone."
            )


def steps(model: Asked) -> Size:
    """What a size is a multiple of."""
    backbone = model.backbone
    return stage_stride(backbone.depth - 1) if isinstance(backbone, ResNet) else backbone.config.stride


def tried_sizes(model: Asked, sizes: Sequence[Size] | None) -> tuple[Size, ...]:
    """The sizes to compare at: those asked for; of any size the model's own, a wider and a smaller one."""
    (height, width), (down, across) = model.preprocess.size, steps(model)
    if sizes is not None:
        return tuple(sizes) or ((height, width),)
    smaller = (max(2, math.ceil(height / down / 2)) * down, max(2, math.ceil(width / across / 2)) * across)
    return tuple(dict.fromkeys([(height, width), (height + down, width + 2 * across), smaller]))


def described(model: Asked, sizes: Sequence[Size] | None, pixels: bool, precision: str) -> dict[str, Any]:
    """The metadata: all that whoever runs the file has to know."""
    whole = model.model
    classifier = isinstance(whole, Classifier) and model.reading is None
    output = whole.config.output if isinstance(whole, Classifier) and classifier else "features"
    return {
        "format": FORMAT,
        "labels": list(whole.labels) if isinstance(whole, Classifier) and classifier else [],
        "preprocess": to_json(model.preprocess),
        "sizes": "any" if sizes is None else [list(size) for size in sizes],
        "multiple_of": list(steps(model)),
        "input": "uint8 pixels, b c h w" if pixels else "normalised float32 pictures, b c h w",
        "output": output,
        "reading": model.reading or ("" if classifier else "planned"),
        "precision": precision,
        "merge": merging(whole),
    }


def program(model: Asked, size: Size, free: bool, pixels: bool, precision: str) -> torch.export.ExportedProgram:
    given = Halved(model) if precision == "bf16" else model
    return traced(given, size, pixels, steps(model) if free else None)


def write_openvino(
    model: Asked, path: Path, size: Size, free: bool, pixels: bool, precision: str, quantised: Any, said: str
) -> Callable[[Tensor], Tensor]:
    openvino = import_openvino("--to openvino")
    if quantised is not None:
        graph = taking_pixels(openvino, quantised.model, model.preprocess) if pixels else quantised.model.clone()
    else:
        graph = converted(openvino, program(model, size, free, pixels, precision))
    graph.set_rt_info(said, [KEY])
    openvino.save_model(graph, path, compress_to_fp16=False)
    setup = Setup("openvino", "int8" if quantised is not None else "fp32")
    compiled = openvino_core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": OpenVino.hint(setup.precision)})
    return lambda images: torch.from_numpy(compiled([images.numpy()])[0].copy())


def write_onnx(
    model: Asked, path: Path, size: Size, free: bool, pixels: bool, precision: str, quantised: Any, said: str
) -> Callable[[Tensor], Tensor]:
    onnx, runtime = needed("onnx", "--to onnx"), needed("onnxruntime", "--to onnx")
    made = onnx_model(program(model, size, free, pixels, precision), "--to onnx")
    entry = made.metadata_props.add()
    entry.key, entry.value = KEY, said
    large = made.ByteSize() >= 2**31 - 2**20  # a protocol buffer ends there; the weights then lie in a file beside it
    onnx.save_model(made, str(path), save_as_external_data=large, location=f"{path.name}.data")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def write_program(
    model: Asked, path: Path, size: Size, free: bool, pixels: bool, precision: str, quantised: Any, said: str
) -> Callable[[Tensor], Tensor]:
    with quiet():
        torch.export.save(program(model, size, free, pixels, precision), path, extra_files={f"{KEY}.json": said})
        run = torch.export.load(path).module()

    def ask(images: Tensor) -> Tensor:
        with torch.no_grad():
            return run(images)

    return ask


WRITERS = {"openvino": write_openvino, "onnx": write_onnx, "torch-export": write_program}


def sizes_from(words: Sequence[str]) -> tuple[Size, ...] | None:
    """`--sizes`: 224, 384x256 (height x width), or any. Raises UserError."""
    found = []
    for word in words:
        if word == "any":
            return None
        parts = word.split("x")
        if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
            raise UserError(f"--sizes {word} is no size; give 224, 384x256 (height x width), or any.")
        found.append((int(parts[0]), int(parts[-1])))
    return tuple(dict.fromkeys(found))
