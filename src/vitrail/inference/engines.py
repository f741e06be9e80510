"""Engines: the same model, run by PyTorch, torch.compile, OpenVINO or ONNX Runtime, behind one small interface."""

import copy
import importlib.util
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from vitrail.core.compiling import compiling
from vitrail.core.device import Precision, autocast
from vitrail.core.errors import UserError
from vitrail.inference.agreement import compare, sample_pictures
from vitrail.inference.features import Model, default_cache
from vitrail.inference.graphs import (
    Asked,
    asked,
    evaluating,
    needed,
    onnx_bytes,
    traced,
)
from vitrail.inference.openvino import EnginePrecision, OpenVino, Setup

EngineName = Literal["auto", "eager", "compile", "openvino", "onnx"]
PACKAGES = {"eager": "torch", "compile": "torch", "openvino": "openvino", "onnx": "onnxruntime"}
COMPARED = 2
"""Pictures on which an engine is compared with the model before it is used."""


@runtime_checkable
class Engine(Protocol):
    """Pictures (b c h w), any b, to answers (b k): fp32, on the CPU. uint8 pixels are normalised inside; floating pictures
    are normalised already. Takes the place of `of` in `inference.predict.predict`."""

    @property
    def name(self) -> str: ...

    @property
    def precision(self) -> EnginePrecision: ...

    def __call__(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b k"]: ...


class Eager:
    """PyTorch as it is, or compiled, on any device. bf16 is autocast over matrices that are bf16 already."""

    def __init__(self, model: Asked, setup: Setup, batch: int, device: torch.device, threads: int = 0) -> None:
        self.name, self.precision = setup.name, setup.precision
        self.device, self.batch, self.threads = device, batch, threads
        self.model = halved(model) if setup.precision == "bf16" else model
        compiled = setup.name == "compile"
        self.ask: Any = torch.compile(self.model, dynamic=False) if compiled else self.model
        # Faster by a hundredth for a small model, but nothing that a compiled graph was made for.
        self.mode = nullcontext if compiled else torch.inference_mode

    def __call__(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        # A compiled graph is made for one batch size: what is left over is filled up to it, and never compiled anew.
        parts = images.split(self.batch) if self.name == "compile" else (images,)
        before = torch.get_num_threads()
        # Not even to the same number where that is the present one: it empties oneDNN's cache.
        others = self.threads not in (0, before)
        if others:
            torch.set_num_threads(self.threads)
        try:
            precision: Precision = "bf16" if self.precision == "bf16" else "fp32"
            with (
                evaluating(self.model),
                self.mode(),
                autocast(self.device, precision),
                compiling("--engine compile"),
            ):
                answers = [self.one(part) for part in parts]
        finally:
            if others:
                torch.set_num_threads(before)
        return torch.cat(answers).float().cpu()

    def one(self, images: Tensor) -> Tensor:
        count = images.shape[0]
        if self.name == "compile" and count < self.batch:
            images = torch.cat([images, images[:1].expand(self.batch - count, -1, -1, -1)])
        images = images.to(self.device, non_blocking=True)
        if self.name == "compile" and images.is_inference():
            images = images.clone()  # another kind of tensor to torch.compile, which would begin anew
        return self.ask(images)[:count]


class Onnx:
    """ONNX Runtime, fp32 on the CPU; one session for each type and size of pictures."""

    name = "onnx"
    precision: EnginePrecision = "fp32"

    def __init__(self, model: Asked, size: tuple[int, int], threads: int) -> None:
        self.runtime = needed("onnxruntime", "--engine onnx")
        self.model, self.threads = model, threads
        self.sessions: dict[tuple[torch.dtype, tuple[int, int]], Any] = {}
        self.session(torch.uint8, size)

    def __call__(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        images = images.detach().cpu().contiguous()
        if images.dtype != torch.uint8:
            images = images.float()
        session = self.session(images.dtype, (images.shape[2], images.shape[3]))
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    def session(self, dtype: torch.dtype, size: tuple[int, int]) -> Any:
        if (dtype, size) not in self.sessions:
            options = self.runtime.SessionOptions()
            options.intra_op_num_threads = self.threads
            options.log_severity_level = 3
            made = onnx_bytes(traced(self.model, size, dtype == torch.uint8))
            self.sessions[dtype, size] = self.runtime.InferenceSession(made, options, ["CPUExecutionProvider"])
        return self.sessions[dtype, size]


def engine(
    model: Model | Asked,
    name: EngineName = "auto",
    precision: EnginePrecision = "fp32",
    *,
    batch: int = 8,
    size: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    threads: int = 0,
    quantised: Any = None,
    cache: Path | None = None,
    progress: bool = False,
) -> Engine:
    """A model as a function from pictures to answers, by the engine that is asked for.

        fast = vitrail.engine(model, "auto", "bf16", batch=8)
        logits = fast(vitrail.read(["cat.jpg"], model.preprocess))

    model: on `device`; a classifier (logits) or a backbone (the class token, else the mean of the patch tokens); `Asked`
        for any other reading. The engine keeps hold of it: change its weights, and make a new engine.
    name: "auto" measures the engines that are there and takes the fastest (`choose`).
    batch, size: what it is made for; others work, more slowly. size: (height, width); None is the model's own.
    threads: 0 is torch's number. quantised: what `inference.quantise.quantise` made, for precision "int8".
    cache: where graphs and measurements are kept; None is `engine_cache()`.

    Raises UserError where a package is missing, where an engine does not have that precision or device, and where its
    answers to two pictures are not the model's.
    """
    if name == "auto":
        from vitrail.inference.choose import choose

        return choose(
            model,
            precision,
            batch=batch,
            size=size,
            device=device,
            threads=threads,
            quantised=quantised,
            cache=cache or engine_cache(),
            progress=progress,
        ).engine
    whole = asked(model)
    streams = min(batch, threads or torch.get_num_threads())
    made = build(
        whole,
        Setup(name, precision, streams),
        batch=batch,
        size=size,
        device=device,
        threads=threads,
        quantised=quantised,
        cache=cache or engine_cache(),
    )
    if name != "eager":
        pixels = sample_pictures(whole.preprocess, COMPARED, size)
        if not (found := compare(whole, made, pixels, precision, str(device))).passed:
            raise UserError(f"--engine {name} gives other answers than the model ({found.said}); give another engine.")
    return made


def build(
    model: Asked,
    setup: Setup,
    *,
    batch: int,
    size: tuple[int, int] | None,
    device: torch.device | str,
    threads: int,
    quantised: Any = None,
    cache: Path | None = None,
) -> Engine:
    """The engine of one setup. Raises UserError as `engine` does."""
    device, size = torch.device(device), size or model.preprocess.size
    number = threads or torch.get_num_threads()
    if setup.name not in PACKAGES:
        raise UserError(f"--engine {setup.name} is not known; give auto, {', '.join(PACKAGES)}.")
    if setup.name in ("openvino", "onnx") and device.type != "cpu":
        raise UserError(
            f"--engine {setup.name} runs on the CPU, not on {device}; give --device cpu, or another engine."
        )
    if setup.precision == "int8":
        if setup.name != "openvino":
            raise UserError(f"--engine {setup.name} has no int8; give --engine openvino or auto.")
        if quantised is None:
            raise UserError("int8 has to be calibrated on pictures first; give --calibrate with some of yours.")
        return OpenVino(model, setup, size, number, cache, ready=quantised.model)
    if setup.name == "openvino":
        return OpenVino(model, setup, size, number, cache, alone=batch == 1)
    if setup.name == "onnx":
        if setup.precision != "fp32":
            raise UserError(
                f"--engine onnx has no {setup.precision} on a CPU; give --precision fp32, or another engine."
            )
        return Onnx(model, size, number)
    return Eager(model, setup, batch, device, threads)


def installed(name: str) -> bool:
    """Whether an engine's packages are there."""
    names = ("onnxruntime", "onnx", "onnxscript") if name == "onnx" else (PACKAGES[name],)
    return all(importlib.util.find_spec(package) is not None for package in names)


def halved(model: Asked) -> Asked:
    """A copy whose matrices are bf16 and all else as before, so that autocast need not cast them at each call."""
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, nn.Linear):
            module.to(torch.bfloat16)
    return Asked(twin.model, twin.reading, twin.preprocess)


def engine_cache() -> Path:
    """$VITRAIL_CACHE/engines, or ~/.cache/vitrail/engines. May be deleted at any time."""
    return default_cache().with_name("engines")
