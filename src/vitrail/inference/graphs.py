"""A model as a graph that other runtimes run: one trace by torch.export, from which OpenVINO's and ONNX's are made.

Unusual: openvino and nncf send usage statistics when they are imported, and when they convert, unless their package for
that is missing. `import_openvino` makes it missing, so it is the only way in to either of them.
"""

import contextlib
import functools
import importlib
import itertools
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.inference import predict
from vitrail.inference.features import Model, Reading, reader
from vitrail.models.classifier import Classifier
from vitrail.models.resnet import ResNet
from vitrail.models.vit import ViT

LARGEST_ONNX = 2 * 1024**3
"""Bytes that a protocol buffer can hold, and so ONNX's model without files beside it."""


class Asked(nn.Module):
    """What is asked of a model, as one tensor in and one out: logits of a classifier, or a reading of any model.

    reading: None is a classifier's logits, and "planned" of a bare backbone. preprocess: of uint8 pixels; None is the
    model's own.
    """

    def __init__(self, model: Model, reading: Reading | None = None, preprocess: Preprocess | None = None) -> None:
        super().__init__()
        self.model = model
        self.reading = reading
        self.preprocess = preprocess or model.preprocess
        logits = isinstance(model, Classifier) and reading is None
        self.ask = model if logits else reader(model, reading or "planned")

    @property
    def backbone(self) -> ViT | ResNet:
        return self.model.backbone if isinstance(self.model, Classifier) else self.model

    def forward(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        """uint8 pixels, which are normalised here, or floating pictures that are normalised already."""
        return self.ask(self.preprocess.normalize(images) if images.dtype == torch.uint8 else images)


def asked(model: Model | Asked) -> Asked:
    return model if isinstance(model, Asked) else Asked(model)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode and without gradients inside; each module comes out in the mode it was found in."""
    with predict.evaluating(model), torch.inference_mode(False), torch.no_grad():
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Tracers warn of much that a person can do nothing about."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def needed(package: str, flag: str) -> types.ModuleType:
    """An optional package. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f'{flag} needs the package {package}: pip install "vitrail[export]".') from error


def import_openvino(flag: str = "--engine openvino") -> Any:
    """openvino, without its telemetry (nncf's likewise, where that is imported later). Raises UserError if missing."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return needed("openvino", flag)


def openvino_core(flag: str = "--engine openvino") -> Any:
    """The one openvino.Core of this process, which stays to its end. Raises UserError if openvino is missing."""
    import_openvino(flag)
    return _core()


@functools.cache
def _core() -> Any:
    # Each Core gives the main thread a stack for signals and sets the earlier one again when it goes: of two whose lives
    # overlap, the later one to go leaves a stack that is no longer there, and the next signal, Ctrl-C's, is a crash.
    return import_openvino().Core()


def easy(rows: int) -> int:
    """The next number of rows that oneDNN multiplies at full speed: it cuts them into equal blocks of at most 64, and
    numbers without a divisor from 16 to 64 take up to a fifth longer. A class token makes such of most grids: of ViT-S/16's
    197 tokens (a prime) twelve MLPs take 19.2 ms, of 198 15.5 (two AVX512-BF16 cores, bf16, OpenVINO 2026.4)."""
    return next(each for each in itertools.count(rows) if any(each % block == 0 for block in range(16, 65)))


def fillers(model: Asked, size: tuple[int, int]) -> int:
    """How many more tokens make the model's an easy number; 0 where it cannot have them, or needs none."""
    backbone = model.backbone
    if not isinstance(backbone, ViT) or backbone.merge or not backbone.enters_at_stem:
        return 0
    down, across = backbone.config.stride
    count = backbone.config.prefixes + (size[0] // down) * (size[1] // across)
    return easy(count) - count


@contextlib.contextmanager
def filled(model: Asked, count: int) -> Iterator[None]:
    """With so many more tokens inside, which only a ViT can have."""
    if isinstance(model.backbone, ViT):
        model.backbone.encoder.fillers = count
    try:
        yield
    finally:
        if isinstance(model.backbone, ViT):
            model.backbone.encoder.fillers = 0


def traced(
    model: Asked, size: tuple[int, int], pixels: bool = False, multiple: tuple[int, int] | None = None
) -> torch.export.ExportedProgram:
    """The program for any number of pictures of `size` (height, width); pixels: uint8 in, instead of normalised fp32.

    multiple: for any size that is a multiple of this, twice it or more, in place of `size`. Raises UserError where the
    model cannot.
    """
    dims: dict[int, Any] = {0: torch.export.Dim("b", min=1)}
    if multiple is not None:
        # Two lengths that no model has as its own, and that differ: what is equal by chance would be taken to stay so.
        size = (multiple[0] * 5, multiple[1] * 6)
        dims[2] = multiple[0] * torch.export.Dim("y", min=2)
        dims[3] = multiple[1] * torch.export.Dim("x", min=2)
    shape = (2, model.preprocess.channels, *size)
    with evaluating(model), quiet():
        example = torch.zeros(shape, dtype=torch.uint8 if pixels else torch.float32)
        try:
            return torch.export.export(model, (example,), dynamic_shapes=(dims,))
        except torch._dynamo.exc.UserError as error:
            said = str(error).splitlines()[0]
            raise UserError(
                f"this model cannot be traced for every size or batch ({said}); give one of --sizes."
            ) from error


def openvino_model(model: Asked, size: tuple[int, int], pixels: bool = False, alone: bool = False) -> Any:
    """An openvino.Model for any number of pictures of `size`: `traced`, converted. Raises UserError if missing.

    alone: for one picture at a time, whose tokens are made an easy number; of several, the rows mostly are one anyway.
    """
    openvino = import_openvino()
    with filled(model, fillers(model, size) if alone else 0):
        return converted(openvino, traced(model, size, pixels))


def converted(openvino: Any, program: torch.export.ExportedProgram) -> Any:
    with quiet():
        made = openvino.convert_model(program)
    # What torch.export knows of the sizes is lost on the way.
    shape = next(
        node.meta["val"].shape for node in program.graph.nodes if node.name in program.graph_signature.user_inputs
    )
    made.reshape([side if isinstance(side, int) else -1 for side in shape])
    made.inputs[0].get_tensor().set_names({"images"})
    made.outputs[0].get_tensor().set_names({"answers"})
    return made


def taking_pixels(openvino: Any, graph: Any, preprocess: Preprocess) -> Any:
    """A copy of a graph for normalised pictures that takes uint8 and normalises it."""
    from openvino.preprocess import PrePostProcessor

    steps = PrePostProcessor(graph.clone())
    steps.input().tensor().set_element_type(openvino.Type.u8).set_layout(openvino.Layout("NCHW"))
    steps.input().model().set_layout(openvino.Layout("NCHW"))
    steps.input().preprocess().convert_element_type(openvino.Type.f32).mean(
        [255 * mean for mean in preprocess.mean]
    ).scale([255 * deviation for deviation in preprocess.deviation])
    return steps.build()


def onnx_model(program: torch.export.ExportedProgram, flag: str = "--engine onnx") -> Any:
    """An onnx.ModelProto. Raises UserError where onnx or onnxscript is missing."""
    needed("onnx", flag)
    needed("onnxscript", flag)
    with quiet():
        made = torch.onnx.export(
            program, input_names=["images"], output_names=["answers"], dynamo=True, verbose=False, optimize=True
        )
    assert made is not None
    return made.model_proto


def onnx_bytes(program: torch.export.ExportedProgram) -> bytes:
    """The same as one string. Raises UserError where the model is too large to be one."""
    made = onnx_model(program)
    if made.ByteSize() >= LARGEST_ONNX:
        raise UserError("--engine onnx takes models of less than 2 GiB, and this one has more; give --engine openvino.")
    return bytes(made.SerializeToString())
