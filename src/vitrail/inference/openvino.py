"""OpenVINO as an engine, and how any engine is set up.

Unusual: throughput mode even for a single batch. Streams have one thread each, and a batch is cut into as many parts, so
that no thread ever waits for another inside a layer. For a batch of one picture a single stream with all threads can be
faster; `choose` tries both.
"""

import functools
import hashlib
import json
import shutil
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.values import to_json
from vitrail.inference.features import merging, weights_hash
from vitrail.inference.graphs import Asked, import_openvino, openvino_core, openvino_model, taking_pixels

EnginePrecision = Literal["fp32", "bf16", "int8"]
FORMAT = 3
"""Part of the cache's key: raise it when the same model becomes another graph."""
LARGEST_PART = 8
"""Pictures that OpenVINO looks at in one request: more only make the activations leave the caches."""


@dataclass(frozen=True)
class Setup:
    """How an engine is set up.

    streams: OpenVINO's requests at a time, each with its share of the threads; 1 is its latency mode.
    part: the most pictures of a request; 0: as many as LARGEST_PART allows.
    """

    name: str
    precision: EnginePrecision = "fp32"
    streams: int = 1
    part: int = 0

    @property
    def said(self) -> str:
        if self.name != "openvino":
            return f"{self.name} {self.precision}"
        mode = "1 stream of all threads" if self.streams == 1 else f"{self.streams} streams"
        return f"openvino {self.precision}, {mode}" + (f", {self.part} a request" if self.part else "")


class OpenVino:
    """A compiled OpenVINO model for each type of pictures and each size that was asked for."""

    name = "openvino"

    def __init__(
        self,
        model: Asked,
        setup: Setup,
        size: tuple[int, int],
        threads: int,
        cache: Path | None,
        ready: Any = None,
        alone: bool = False,
    ) -> None:
        """alone: made for one picture at a time. ready: an openvino.Model to take in place of converting `model`: a
        quantised one, whose `size` is the only one."""
        self.openvino = import_openvino()
        self.precision, self.setup, self.size, self.threads = setup.precision, setup, size, threads
        self.model, self.cache, self.preprocess = model, cache, model.preprocess
        self.graphs = {} if ready is None else {size: ready}
        self.quantised, self.alone = ready is not None, alone
        self.queues: dict[tuple[torch.dtype, tuple[int, int]], Any] = {}
        self.queue(torch.uint8, size)

    def __call__(self, images: Shaped[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
        images = images.detach().cpu().contiguous()
        if images.dtype != torch.uint8:
            images = images.float()
        count, streams = images.shape[0], self.setup.streams
        queue, width = self.queue(images.dtype, (images.shape[2], images.shape[3]))
        answers = np.empty((count, width), np.float32)

        def keep(request: Any, place: slice) -> None:
            answers[place] = request.get_output_tensor(0).data

        queue.set_callback(keep)
        # As many parts as streams, or a multiple, and all of one length up to one picture.
        rounds = -(-count // (streams * (self.setup.part or LARGEST_PART)))
        pixels, start = images.numpy(), 0
        for part in np.array_split(pixels, max(1, min(count, streams * rounds))):
            queue.start_async({0: self.openvino.Tensor(part, shared_memory=True)}, slice(start, start + len(part)))
            start += len(part)
        queue.wait_all()
        return torch.from_numpy(answers)

    def queue(self, dtype: torch.dtype, size: tuple[int, int]) -> tuple[Any, int]:
        """The queue of requests for such pictures, and how many numbers come out for each; compiled on first use."""
        if (dtype, size) not in self.queues:
            if size not in self.graphs:
                if self.quantised:
                    raise UserError(
                        f"the int8 model takes pictures of {self.size[0]} x {self.size[1]}, not {size[0]} x {size[1]}; "
                        "quantise it for that size."
                    )
                self.graphs[size] = self.graph(size)
            graph = self.graphs[size]
            if dtype == torch.uint8:
                graph = taking_pixels(self.openvino, graph, self.preprocess)
            compiled = openvino_core().compile_model(graph, "CPU", self.properties())
            requests = self.openvino.AsyncInferQueue(compiled, self.setup.streams)
            self.queues[dtype, size] = requests, compiled.output(0).partial_shape[1].get_length()
        return self.queues[dtype, size]

    def graph(self, size: tuple[int, int]) -> Any:
        """The model as a graph for normalised pictures, from the cache where there is one."""
        make = functools.partial(openvino_model, self.model, size, alone=self.alone)
        if self.cache is None:
            return make()
        folder = self.cache / graph_key(self.model, size, self.alone)
        if not (folder / "model.xml").exists():
            made = make()
            part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
            try:
                part.mkdir(parents=True)
                self.openvino.save_model(made, part / "model.xml", compress_to_fp16=False)
                part.rename(folder)
            except (OSError, RuntimeError):
                shutil.rmtree(part, ignore_errors=True)  # full, not to be written, or made by another process just now
                return made
        try:
            return openvino_core().read_model(folder / "model.xml")
        except RuntimeError:
            shutil.rmtree(folder, ignore_errors=True)  # damaged
            return make()

    @staticmethod
    def hint(precision: EnginePrecision) -> str:
        """What is no int8 runs in bf16 in an int8 model too, on a processor that has bf16: without it, AVX-512 gives NaN."""
        able = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return "bf16" if able and precision != "fp32" else "f32"

    def properties(self) -> dict[str, Any]:
        streams = self.setup.streams
        told = {
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
            "NUM_STREAMS": str(streams),
            "INFERENCE_NUM_THREADS": self.threads,
            "INFERENCE_PRECISION_HINT": self.hint(self.precision),
        }
        kept = None if self.cache is None else compiled_folder(self.cache)
        return told if kept is None else {**told, "CACHE_DIR": str(kept)}


@functools.cache
def compiled_folder(cache: Path) -> Path | None:
    """Where OpenVINO keeps what it has compiled; None, and one sentence on standard error, where it cannot be written."""
    folder = cache / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()  # it may be there, on a disk that is only read
    except OSError as error:
        print(
            f"{folder} cannot be written ({error.strerror}), so OpenVINO compiles anew each time; set VITRAIL_CACHE to a "
            "folder that can.",
            file=sys.stderr,
            flush=True,
        )
        return None
    return folder


def graph_key(model: Asked, size: tuple[int, int], alone: bool = False) -> str:
    """What a graph is kept under: all that decides it, hex digits."""
    versions = [torch.__version__, package_version("openvino")]
    parts = [FORMAT, weights_hash(model.model), merging(model.model), model.reading, size, alone, versions]
    return hashlib.sha256(json.dumps(to_json(parts)).encode()).hexdigest()


def package_version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return ""
