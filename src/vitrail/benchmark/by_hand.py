"""OpenVINO as an expert would set it up, without any of our own engines: the bar that `auto` is held against.

Converted by OpenVINO's own tracer at one fixed size, its number of streams found by trying, the batch cut among them.
"""

import contextlib
import importlib.util
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitrail.benchmark.alternation import Side
from vitrail.inference.graphs import import_openvino, openvino_core, quiet

TRIALS = 3


def there() -> bool:
    return importlib.util.find_spec("openvino") is not None


def fastest(model: nn.Module, images: Tensor, precision: str, threads: int) -> tuple[Side, str]:
    """The fastest of a few numbers of streams, and what it is. int8 is NNCF's transformer preset, the rest in bf16."""
    openvino = import_openvino()
    pixels = images.cpu().numpy()
    with quiet(), torch.no_grad():
        graph = openvino.convert_model(model, example_input=images[:1])
    channels, height, width = images.shape[1:]
    graph.reshape([-1, channels, height, width])
    if precision == "int8":
        graph = _quantised(graph, pixels.shape[1:])
    found: dict[int, tuple[float, Side]] = {}
    for streams in sorted({1, min(2, len(pixels)), min(threads, len(pixels)), min(2 * threads, len(pixels))}):
        call = _streams(openvino, graph, pixels, streams, precision, threads)
        call()
        times = []
        for _ in range(TRIALS):
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        found[streams] = min(times), call
    streams = min(found, key=lambda number: found[number][0])
    return found[streams][1], f"{streams} stream{'s' if streams > 1 else ''}"


def _streams(openvino: Any, graph: Any, pixels: np.ndarray, streams: int, precision: str, threads: int) -> Side:
    hint = "LATENCY" if streams == 1 else "THROUGHPUT"
    told = {
        "PERFORMANCE_HINT": hint,
        "NUM_STREAMS": str(streams),
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32" if precision == "fp32" else "bf16",
    }
    compiled = openvino_core().compile_model(graph, "CPU", told)
    queue = openvino.AsyncInferQueue(compiled, streams)
    parts = np.array_split(pixels, min(streams, len(pixels)))
    answers: list[Any] = [None] * len(parts)
    queue.set_callback(lambda request, place: answers.__setitem__(place, request.get_output_tensor(0).data.copy()))

    def call() -> np.ndarray:
        for place, part in enumerate(parts):
            queue.start_async({0: part}, place)
        queue.wait_all()
        return np.concatenate(answers)

    return call


def _quantised(graph: Any, shape: tuple[int, ...]) -> Any:
    import nncf

    generator = np.random.default_rng(0)
    noise = [generator.standard_normal((1, *shape), np.float32) for _ in range(16)]
    with quiet(), contextlib.suppress(AttributeError):
        nncf.set_log_level(40)
    return nncf.quantize(graph, nncf.Dataset(noise), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(noise))
