"""How a verb reads a checkpoint, and what runs it: the flags that predict, evaluate, probe and vtab have in common."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.text import Text

from vitrail.core.device import Precision, pick_device
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess, Source
from vitrail.inference.engines import Engine, EngineName, EnginePrecision, engine, engine_cache
from vitrail.inference.features import Reading
from vitrail.inference.graphs import Asked
from vitrail.layers.merging import Merging
from vitrail.models.classifier import Classifier
from vitrail.models.vit import merge_tokens
from vitrail.weights.load import Model, load, load_any

FEW = 64
"""So many pictures are answered before an engine is set up; for no more of them, auto is eager."""


@dataclass(frozen=True)
class Checkpoint:
    """Of the checkpoint, the device and the engine."""

    device: str = ""
    """cpu, cuda, cuda:1, mps; none: the fastest there is."""
    engine: EngineName | Literal[""] = "eager"
    """What runs the model. eager: PyTorch, whose fp32 numbers are those to publish; auto: the fastest here, measured once
    for this model and batch, and remembered; compile, openvino, onnx: that one; none: auto if that saves time in the end,
    else eager."""
    precision: EnginePrecision = "fp32"
    """Of matrix products; bf16 changes probabilities in the third digit. int8 needs --calibrate, and OpenVINO."""
    merge: str = "0"
    """Patch tokens to merge in each block (arXiv 2210.09461): faster, and less exact; 0: none. As
    48,blocks=1+3,by=tokens,keep=one,attention=plain: in blocks 1 and 3 only, those whose outputs (not keys) are alike, of
    which one stays as it is (not their mean) and is looked at once (not as often as it stands for tokens)."""
    calibrate: str = ""
    """For int8: your own pictures, given as --data is, with or without labels. Part calibrates, part measures the loss."""
    int8_drop: float = 0.5
    """Points of top-1 that int8 may cost on those pictures; above, bf16 is used instead, and it is said."""
    heads: int | None = None
    """Attention heads, for checkpoints of other libraries that cannot say."""
    grid: tuple[int, int] | None = None
    """Rows and columns of the position table, likewise."""
    preprocess: str = ""
    """Preprocessing, where the checkpoint does not state it: as imagenet,bicubic,resize=256,size=224."""

    def on(self) -> torch.device:
        """Raises UserError on a device that is not there."""
        return pick_device(self.device or None)

    def classifier(self, weights: Path) -> Classifier:
        """A checkpoint with a head, on the device. Raises UserError."""
        device = self.on()
        model = load(str(weights), heads=self.heads, grid=self.grid, preprocess=self.preprocess or None)
        merge_tokens(model.backbone, self.merge)
        return model.to(device)

    def model(self, weights: Path) -> Model:
        """A checkpoint with a head or without one, likewise."""
        device = self.on()
        model = load_any(str(weights), heads=self.heads, grid=self.grid, preprocess=self.preprocess or None)
        merge_tokens(model.backbone if isinstance(model, Classifier) else model, self.merge)
        return model.to(device)

    @property
    def merging(self) -> Merging:
        """How tokens are merged. Raises UserError."""
        return Merging.of(self.merge)

    @property
    def autocast(self) -> Precision:
        """The precision of a model that runs eagerly."""
        return "bf16" if self.precision == "bf16" else "fp32"

    def eager(self, verb: str) -> Precision:
        """The precision, for a verb that has no other engine. Raises UserError where another was asked for."""
        if self.engine != "eager" or self.precision == "int8":
            raise UserError(f"{verb} runs eagerly, in fp32 or bf16; leave out --engine, and int8.")
        return self.autocast

    def asking(
        self,
        model: Model,
        *,
        batch: int,
        pictures: int | None = None,
        reading: Reading | None = None,
        preprocess: Preprocess | None = None,
        weights: Path | None = None,
    ) -> Engine | None:
        """The engine that was asked for, made for `batch` pictures at a time and told of on standard error.

        None: plain eager PyTorch, under `autocast`. pictures: how many will be looked at, if that is known: for a few,
        nothing is measured. reading, preprocess: as of `graphs.Asked`. weights: where the model is from, for int8 on the
        pictures of its own run. Raises UserError.
        """
        console = Console(stderr=True, soft_wrap=True)
        precision, quantised = self.precision, None
        if precision == "int8":
            if self.engine not in ("", "auto", "openvino"):
                raise UserError(f"--engine {self.engine} has no int8; give --engine auto or openvino.")
        elif self.engine == "eager" or (self.engine in ("", "auto") and pictures is not None and pictures <= FEW):
            return None
        asked = Asked(model, reading, preprocess)
        if precision == "int8":
            if not isinstance(model, Classifier) or reading is not None:
                raise UserError(
                    "int8 is measured by a classifier's answers, and features are none; give --precision bf16."
                )
            if not self.calibrate:
                raise UserError("--precision int8 has to be calibrated; give --calibrate with pictures of your own.")
            from vitrail.inference.calibrate import calibrated

            source = pictures_for_int8(self.calibrate, weights)
            quantised, gate = calibrated(
                asked, source, limit=self.int8_drop, cache=engine_cache(), progress=console.is_terminal
            )
            console.print(Text(gate.said if gate.passed else f"{gate.said} bf16 is used in its place."))
            precision, quantised = ("int8", quantised) if gate.passed else ("bf16", None)
        device = self.on()
        if self.engine and self.engine != "auto":
            return engine(asked, self.engine, precision, batch=batch, device=device, quantised=quantised)
        from vitrail.inference.choose import choose, pays

        cache = engine_cache()
        unasked = not self.engine and self.precision != "int8"
        if unasked and not pays(asked, precision, pictures=pictures, batch=batch, device=device, cache=cache):
            return None
        choice = choose(asked, precision, batch=batch, device=device, quantised=quantised, cache=cache, progress=True)
        console.print(Text(choice.said))
        return choice.engine


def called(weights: Path) -> str:
    """A checkpoint for people: an id whole, of a path its last part."""
    return str(weights) if ":" in str(weights) else weights.name


def pictures_for_int8(spec: str, weights: Path | None = None) -> Source:
    """What --calibrate names, with labels where it has any: the part that evaluate measures on, as a model loses less on
    pictures that it has learnt.

    weights: where the model is from; of its own run's pictures, only those that it held out. Raises UserError.
    """
    from vitrail.commands.evaluate import part
    from vitrail.data import splits, unlabelled

    try:
        found, _ = splits.read(spec)
    except UserError:
        found, _ = unlabelled.read(spec)  # which says what is wrong with it, if that is not the labels
    return part(found, spec, "", weights)[0]
