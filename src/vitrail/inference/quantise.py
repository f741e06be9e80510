"""int8, calibrated on a person's own pictures, and the gate that says whether it may be used.

Weights and activations of the matrix products become int8 by NNCF's post-training quantisation for transformers; what is
left runs in bf16 where the processor has it. Nothing may leave this machine: openvino and nncf send statistics of use
unless their telemetry is missing, so both are imported through `graphs.import_openvino`, which makes it so.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.core.values import to_json
from vitrail.inference.features import Model
from vitrail.inference.graphs import Asked, asked, import_openvino, needed, openvino_core, openvino_model, quiet
from vitrail.inference.openvino import graph_key, package_version

FORMAT = 1
"""Part of the cache's key: raise it when the same pictures give another int8 model."""
PICTURES = 300
"""How many are looked at to calibrate, NNCF's own number."""
LIMIT = 0.5
"""Points of top-1 accuracy that int8 may cost."""
Z = 1.959963984540054
"""The normal distribution's 97.5 % point."""


@dataclass(frozen=True)
class Quantised:
    """model: an openvino.Model for normalised pictures of `size` (height, width). count: pictures it was calibrated on."""

    model: Any
    size: tuple[int, int]
    count: int


def quantise(
    model: Model | Asked,
    pictures: Iterable[UInt8[Tensor, "_ c h w"]],
    *,
    size: tuple[int, int] | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> Quantised:
    """The model in int8, calibrated on uint8 pictures of the model's own preprocessing, or read from the cache.

    pictures: at most PICTURES of them are used, in order; all of one size, which `size` must name where it is not the
        model's own. cache: a folder, or None to keep nothing.

    Raises UserError where openvino or nncf is missing, and where there is no picture.
    """
    whole = asked(model)
    size = size or whole.preprocess.size
    pixels = _first(pictures)
    if (pixels.shape[2], pixels.shape[3]) != size:
        raise UserError(
            f"int8 for pictures of {size[0]} x {size[1]} cannot be calibrated on pictures of "
            f"{pixels.shape[2]} x {pixels.shape[3]}; give both the same size."
        )
    openvino = import_openvino("--precision int8")
    openvino_core()  # before those that nncf makes and lets go
    folder = None if cache is None else cache / quantised_key(whole, pixels, size)
    if folder is not None and (folder / "model.xml").exists():
        try:
            return Quantised(openvino_core().read_model(folder / "model.xml"), size, pixels.shape[0])
        except RuntimeError:
            shutil.rmtree(folder, ignore_errors=True)  # damaged
    made = _quantised(openvino_model(whole, size), whole.preprocess.normalize, pixels, progress)
    if folder is not None:
        part = folder.with_name(f"{folder.name}.{uuid.uuid4().hex}")
        try:
            part.mkdir(parents=True)
            openvino.save_model(made, part / "model.xml", compress_to_fp16=False)
            part.rename(folder)
        except (OSError, RuntimeError):
            shutil.rmtree(part, ignore_errors=True)  # full, not to be written, or made by another process just now
    return Quantised(made, size, pixels.shape[0])


def quantised_key(model: Asked, pixels: UInt8[Tensor, "b c h w"], size: tuple[int, int]) -> str:
    """What an int8 model is kept under: all that decides it, hex digits."""
    seen = hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()
    parts = [FORMAT, graph_key(model, size), to_json(model.preprocess), seen, package_version("nncf"), saturates()]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _first(pictures: Iterable[UInt8[Tensor, "_ c h w"]]) -> UInt8[Tensor, "b c h w"]:
    found: list[Tensor] = []
    for batch in pictures:
        found.append(batch[: PICTURES - sum(part.shape[0] for part in found)])
        if sum(part.shape[0] for part in found) >= PICTURES:
            break
    if not sum(part.shape[0] for part in found):
        raise UserError("int8 needs at least one picture to be calibrated on; give --calibrate a folder with some.")
    return torch.cat(found)


def _quantised(graph: Any, normalize: Callable[[Tensor], Tensor], pixels: Tensor, progress: bool) -> Any:
    # Where openvino was imported before us, its telemetry may be there; this is nncf's own switch, read when imported.
    os.environ.setdefault("NNCF_CI", "1")
    nncf = needed("nncf", "--precision int8")
    nncf.set_log_level(40)
    # One picture at a time: statistics are then of each picture, and memory stays small.
    data = nncf.Dataset(pixels.split(1), lambda one: normalize(one).numpy())
    # Its bars go to standard output.
    bars: Any = sys.stderr if progress else io.StringIO()
    with contextlib.redirect_stdout(bars), quiet():
        return nncf.quantize(
            graph,
            data,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=pixels.shape[0],
            fast_bias_correction=True,
            # Weights of 7 bits where sums of 8-bit ones would be cut off; else nncf's own choice.
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                overflow_fix=nncf.OverflowFix.ENABLE if saturates() else nncf.OverflowFix.FIRST_LAYER
            ),
            # OpenVINO's fused attention does not compute in int8: quantised before it, and back inside, numbers would only
            # lose digits and time (DINOv2-S/14, batch 8: 354 ms for 341 of one core).
            ignored_scope=nncf.IgnoredScope(
                names=matching_nodes(graph), types=["ScaledDotProductAttention"], validate=False
            ),
        )


def saturates() -> bool:
    """Whether this processor adds pairs of 8-bit products in 16 bits, where they are cut off: x86 without VNNI."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx2" in flags and "avx512_vnni" not in flags and "avx_vnni" not in flags


def matching_nodes(graph: Any) -> list[str]:
    """The matrix products of token merging: similarities, whose order int8 would blur, and sums by tables of ones."""
    found = []
    for node in graph.get_ops():
        if node.get_type_name() != "MatMul":
            continue
        compared = {target.get_node().get_type_name() for target in node.output(0).get_target_inputs()}
        if "TopK" in compared or _is_table(node.input(0).get_source_output().get_node()):
            found.append(node.get_friendly_name())
    return found


def _is_table(node: Any) -> bool:
    """Whether these numbers are ones where two indices agree, shared out among what meets in one place."""
    while node.get_type_name() in ("Broadcast", "Multiply", "Divide", "Convert"):
        node = node.input(0).get_source_output().get_node()
    return node.get_type_name() == "Equal"


@dataclass(frozen=True)
class Gate:
    """What int8 costs, on pictures that it was not calibrated on.

    drop: points of top-1 accuracy lost, with its 95 % interval; where no labels are known (`labelled` is False), the share
    of answers that changed, in %, which the loss cannot exceed. count: pictures. limit: what `drop` may be.
    """

    drop: float
    low: float
    high: float
    count: int
    limit: float
    labelled: bool

    @property
    def passed(self) -> bool:
        return self.drop <= self.limit

    @property
    def said(self) -> str:
        """One sentence for people."""
        interval = (
            f"95 % interval {self.low:+.2f} to {self.high:+.2f}"
            if self.labelled
            else (f"95 % interval {self.low:.2f} to {self.high:.2f}")
        )
        if self.labelled:
            seen = f"int8 costs {self.drop:.2f} points of top-1 on {self.count:,} held-out pictures ({interval})"
        else:
            seen = (
                f"int8 changes {self.drop:.2f} % of the answers to {self.count:,} held-out pictures ({interval}); without "
                "labels the loss in top-1 is only known to be no more than that"
            )
        if not self.passed:
            return f"{seen}: above the limit of {self.limit:g}, so int8 is not used."
        if self.high > self.limit:
            return f"{seen}: within the limit of {self.limit:g}, though so few pictures cannot rule out more."
        return f"{seen}: within the limit of {self.limit:g}."


def gate(
    before: Float[Tensor, "n k"],
    after: Float[Tensor, "n k"],
    labels: Int[Tensor, "n"] | None = None,
    limit: float = LIMIT,
) -> Gate:
    """Whether int8 may be used: answers before (fp32) and after to the same held-out pictures, in the same order.

    labels: class indices, or None. limit: points. Raises UserError where there is no picture.
    """
    if before.shape[0] == 0:
        raise UserError("whether int8 may be used cannot be measured without a held-out picture; give more pictures.")
    first, second = before.argmax(1), after.argmax(1)
    if labels is None:
        changed = int((first != second).sum())
        low, high = wilson(changed, before.shape[0])
        return Gate(100 * changed / before.shape[0], 100 * low, 100 * high, before.shape[0], limit, False)
    return paired((first == labels).numpy(), (second == labels).numpy(), limit)


def paired(before: Bool[np.ndarray, "n"], after: Bool[np.ndarray, "n"], limit: float = LIMIT) -> Gate:
    """The gate from where each was right. The interval is Tango's score interval for paired proportions (1998), which
    stays honest where no answer changed: a bootstrap would then say that nothing can."""
    count = before.size
    lost, won = int((before & ~after).sum()), int((~before & after).sum())
    ends = [100 * _tango(lost, won, count, side) for side in (-1, 1)]
    return Gate(100 * (lost - won) / count, ends[0], ends[1], count, limit, True)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % score interval of a proportion (Wilson 1927)."""
    rate, spread = hits / count, Z * Z / count
    middle, half = rate + spread / 2, math.sqrt(spread * (rate * (1 - rate) + spread / 4))
    return max(0.0, (middle - half) / (1 + spread)), min(1.0, (middle + half) / (1 + spread))


def _tango(lost: int, won: int, count: int, side: int) -> float:
    """The end of the interval on one side (-1, 1): the difference whose score is Z away from what was seen."""
    seen = (lost - won) / count
    near, far = seen, float(side)
    for _ in range(60):
        middle = (near + far) / 2
        near, far = (middle, far) if abs(_score(lost, won, count, middle)) <= Z else (near, middle)
    return (near + far) / 2


def _score(lost: int, won: int, count: int, difference: float) -> float:
    """Tango's score of a difference: what was seen less it, over its error at the likeliest rates that have it."""
    linear = -lost - won + (2 * count - lost + won) * difference
    product = -won * difference * (1 - difference)
    # The likeliest rate of the won, the larger root of 2 n q^2 + linear q + product = 0.
    rate = (math.sqrt(max(linear * linear - 8 * count * product, 0.0)) - linear) / (4 * count)
    variance = count * (2 * rate + difference * (1 - difference))
    gap = lost - won - count * difference
    return 0.0 if gap == 0 else gap / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, gap)
