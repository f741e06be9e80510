"""Forward passes of a model by each engine, of its peers, and of OpenVINO set up by hand, as sides of one measurement.

All are given the same normalised pictures (b c h w) and give logits. A side is named by whose it is, its engine and its
precision: "vitrail auto bf16", "timm eager fp32", "openvino by-hand int8".
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vitrail.benchmark import by_hand, peers
from vitrail.benchmark.alternation import Side
from vitrail.benchmark.subject import subject
from vitrail.core.device import autocast
from vitrail.core.errors import UserError
from vitrail.models.classifier import Classifier
from vitrail.models.vit import merge_tokens

ENGINES = ("auto", "eager", "compile", "openvino", "onnx")
PRECISIONS = ("fp32", "bf16", "int8")
CALIBRATION = 16
"""Pictures of the embedded sample that int8 is calibrated on here, as are those by which engines are compared before they
are used. No speed depends on them, and no accuracy is measured."""


@dataclass(frozen=True)
class Work:
    """What each side does: `batch` pictures of `size` (height, width) pixels, on `threads` cores."""

    model: str
    batch: int
    size: int
    threads: int
    device: str = "cpu"
    merge: int | str = 0

    def build(self) -> Classifier:
        model = subject(self.model, self.size).eval()
        merge_tokens(model.backbone, self.merge)
        return model

    def pictures(self, model: Classifier) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, model.preprocess.channels, *model.preprocess.size)
        return torch.randn(shape, generator=generator).to(self.device)


def names(
    engines: tuple[str, ...], precisions: tuple[str, ...], against: tuple[str, ...], *, compiled: bool, device: str
) -> list[str]:
    """The sides, the reference first: timm eager fp32, else transformers, else our own.

    compiled: whether the peers are measured with torch.compile too. Raises UserError on what is not known.
    """
    for flag, given, known in (("engines", engines, ENGINES), ("precision", precisions, PRECISIONS)):
        for one in given:
            if one not in known:
                raise UserError(f"--{flag} {one} is not known; give one or several of {', '.join(known)}, with commas.")
    if not engines or not precisions:
        raise UserError("--engines and --precision each need at least one name.")
    found = []
    for library in against:
        found += [f"{library} eager fp32"]
        # As most people run it, and as it is fastest: every weight cast beforehand.
        found += [f"{library} autocast bf16", f"{library} cast bf16"] if "bf16" in precisions else []
        if compiled:
            found += [f"{library} compile {precision}" for precision in precisions if precision != "int8"]
    for precision in precisions:
        for engine in engines:
            lacks = {"int8": ("eager", "compile", "onnx"), "bf16": ("onnx",), "fp32": ()}[precision]
            able = engine in ("auto", "eager", "compile") and precision != "int8"
            if engine not in lacks and (device == "cpu" or able):
                found.append(f"vitrail {engine} {precision}")
        if device == "cpu" and by_hand.there() and precision != "fp32":
            found.append(f"openvino by-hand {precision}")
    if not any(one.startswith("vitrail") for one in found):
        where = "" if device == "cpu" else f" on {device}"
        raise UserError(
            f"none of --engines {','.join(engines)} has --precision {','.join(precisions)}{where}; give another of either."
        )
    return found


def side(name: str, work: Work, model: Classifier, against: tuple[str, ...] = ()) -> tuple[Side, str]:
    """One of `names`, ready to be called, and what it chose for itself, if anything. `model`: `work`'s, built."""
    who, how, precision = name.split()
    images, device = work.pictures(model), torch.device(work.device)
    if who == "vitrail":
        return _ours(how, precision, work, model.to(device), images)
    size = model.preprocess.size
    if who == "openvino":
        # Of the peer's own model where there is one: then nothing of ours is in it.
        source = peers.build(against[0], model.config.backbone, model.config.classes) if against else model
        return by_hand.fastest(source.eval(), images, precision, work.threads)
    theirs = peers.build(who, model.config.backbone, model.config.classes).to(device).eval()
    if how == "cast" or (how == "compile" and precision == "bf16"):
        theirs, images = theirs.bfloat16(), images.bfloat16()
    ask = torch.compile(theirs) if how == "compile" else theirs
    mode = torch.no_grad if how == "compile" else torch.inference_mode
    assert size == (images.shape[2], images.shape[3])

    def call() -> Tensor:
        with mode(), autocast(device, "bf16" if how == "autocast" else "fp32"):
            return ask(images).float().cpu()

    return call, ""


def _ours(engine: str, precision: str, work: Work, model: Classifier, images: Tensor) -> tuple[Side, str]:
    from vitrail.inference import engines
    from vitrail.inference.choose import choose

    size, chosen = model.preprocess.size, ""
    given = {"batch": work.batch, "size": size, "device": work.device, "threads": work.threads}
    quantised = None
    if precision == "int8":
        from vitrail.inference.agreement import sample_pictures
        from vitrail.inference.quantise import quantise

        quantised = quantise(model, [sample_pictures(model.preprocess, CALIBRATION, size)], size=size)
    made: engines.Engine
    if engine == "auto":
        # Measured anew at each benchmark: what was remembered of another day proves nothing.
        choice = choose(model, precision, quantised=quantised, cache=None, **given)  # type: ignore[arg-type]
        made, chosen = choice.engine, choice.setup.said
    else:
        made = engines.engine(model, engine, precision, quantised=quantised, **given)  # type: ignore[arg-type]

    def call() -> Tensor:
        return made(images)

    return call, chosen
