"""int8 end to end on a tiny model, the gate against SciPy and brute force, and that nothing is sent."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import brentq, minimize_scalar
from scipy.stats import norm
from torch import Tensor

from vitrail.core.errors import UserError
from vitrail.inference.engines import engine
from vitrail.inference.quantise import Quantised, gate, paired, quantise, wilson
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViTConfig


def classifier() -> Classifier:
    config = ViTConfig(width=32, depth=2, heads=2, mlp=64, patch=(8, 8), image=(32, 32))
    model = ClassifierConfig(config, 5, "class").build(seed=0).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def pictures(count: int, seed: int = 0) -> Tensor:
    """Smooth colours, each its own."""
    small = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(small, (32, 32), mode="bilinear")).to(torch.uint8)


def test_a_model_in_int8_answers_nearly_alike_and_is_kept(tmp_path: Path) -> None:
    model = classifier()
    model.backbone.merge = 2
    seen, unseen = pictures(24), pictures(40, seed=5)
    made = quantise(model, [seen[:10], seen[10:]], cache=tmp_path)
    assert (made.size, made.count) == ((32, 32), 24)
    kinds = [node.get_type_name() for node in made.model.get_ops()]
    assert kinds.count("FakeQuantize") >= 8
    with torch.no_grad():
        before = model(unseen)
    after = engine(model, "openvino", "int8", batch=8, quantised=made, cache=tmp_path)(unseen)
    error = (after - before).norm() / before.norm()
    assert 1e-4 < error < 0.1
    folders = sorted(tmp_path.glob("*/model.xml"))
    assert len(folders) == 1
    written = folders[0].stat().st_mtime_ns
    again = quantise(model, [seen], cache=tmp_path)
    assert folders[0].stat().st_mtime_ns == written
    assert sorted(tmp_path.glob("*/model.xml")) == folders
    torch.testing.assert_close(engine(model, "openvino", "int8", quantised=again, cache=tmp_path)(unseen), after)
    products = [node for node in made.model.get_ops() if node.get_type_name() == "MatMul"]
    free = [node for node in products if not any(_quantised(source) for source in node.inputs())]
    assert (
        len(free) >= 2
    )  # of the first of two blocks: similarities, and sums of merged tokens; the last merges nothing
    folders[0].write_text("<net")
    assert isinstance(quantise(model, [seen], cache=tmp_path), Quantised)


def _quantised(source: object) -> bool:
    return source.get_source_output().get_node().get_type_name() == "FakeQuantize"  # type: ignore[attr-defined]


def test_what_int8_cannot_do_is_said_in_a_sentence() -> None:
    model = classifier()
    with pytest.raises(UserError, match="at least one picture"):
        quantise(model, [])
    with pytest.raises(UserError, match="int8 for pictures of 64 x 64 cannot be calibrated on pictures of 32 x 32"):
        quantise(model, [pictures(2)], size=(64, 64))
    with pytest.raises(UserError, match="held-out picture"):
        gate(torch.zeros(0, 3), torch.zeros(0, 3))


def test_nothing_is_sent() -> None:
    """In a fresh process every connection is an error that is counted, even one that is caught; and the packages that
    would make one are not there to be asked."""
    program = """
import socket, sys
calls = []
def refuse(*given, **named):
    calls.append(given)
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from vitrail.inference.graphs import import_openvino, needed
import_openvino()
nncf = needed("nncf", "--precision int8")
from nncf.telemetry.wrapper import NNCFTelemetryStub, telemetry
assert isinstance(telemetry, NNCFTelemetryStub), telemetry
import openvino, torch
model = openvino.convert_model(torch.nn.Linear(4, 4), example_input=torch.zeros(1, 4))
nncf.quantize(model, nncf.Dataset([torch.zeros(1, 4).numpy()]), subset_size=1)
assert sys.modules.get("openvino_telemetry") is None
assert not calls, calls
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "NNCF_CI", "NNCF_DEV")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def brute(lost: int, won: int, count: int, side: int) -> float:
    """Tango's end by numerical likelihood: no closed form, SciPy's own root and minimum."""

    def score(difference: float) -> float:
        low, high = max(0.0, -difference), (1 - difference) / 2

        def unlikely(rate: float) -> float:  # rate of the won; that of the lost is larger by the difference
            cells = ((lost, rate + difference), (won, rate), (count - lost - won, 1 - 2 * rate - difference))
            return -sum(n * np.log(max(p, 1e-300)) for n, p in cells if n)

        rate = minimize_scalar(unlikely, bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x
        return (lost - won - count * difference) / np.sqrt(count * (2 * rate + difference - difference**2))

    z = norm.ppf(0.975)
    seen, edge = (lost - won) / count, side * (1 - 1e-9)
    return brentq(lambda difference: score(difference) + side * z, seen, edge, xtol=1e-10)


@pytest.mark.parametrize(("lost", "won", "count"), [(7, 2, 400), (0, 3, 50), (12, 12, 1000), (1, 0, 20)])
def test_the_interval_is_tangos(lost: int, won: int, count: int) -> None:
    before = np.arange(count) < lost
    after = (np.arange(count) >= lost) & (np.arange(count) < lost + won)
    found = paired(before, after)
    assert found.drop == pytest.approx(100 * (lost - won) / count)
    assert found.low == pytest.approx(100 * brute(lost, won, count, -1), abs=2e-3)
    assert found.high == pytest.approx(100 * brute(lost, won, count, 1), abs=2e-3)


def test_no_change_on_few_pictures_proves_little() -> None:
    """With nothing changed the ends are z^2 / (n + z^2), Tango's closed form."""
    found = paired(np.ones(100, bool), np.ones(100, bool))
    z = norm.ppf(0.975) ** 2
    assert (found.drop, found.low, found.high) == pytest.approx((0, -100 * z / (100 + z), 100 * z / (100 + z)))
    assert found.passed
    assert "cannot rule out more" in found.said
    assert "cannot" not in paired(np.ones(5000, bool), np.ones(5000, bool)).said


def test_the_gate_falls_back_above_the_limit() -> None:
    before = torch.nn.functional.one_hot(torch.arange(200) % 4).float()
    after, labels = before.clone(), torch.arange(200) % 4
    after[:3] = after[:3].roll(1, 1)  # 1.5 points
    found = gate(before, after, labels)
    assert not found.passed
    assert found.said.startswith("int8 costs 1.50 points of top-1 on 200 held-out pictures")
    assert found.said.endswith("above the limit of 0.5, so int8 is not used.")
    assert gate(before, after, labels, limit=1.5).passed
    assert gate(after, before, labels).drop == -1.5
    assert gate(after, before, labels).passed
    unlabelled = gate(before, after)
    assert (unlabelled.drop, unlabelled.labelled, unlabelled.passed) == (1.5, False, False)
    assert "changes 1.50 % of the answers" in unlabelled.said
    assert "without labels" in unlabelled.said


def test_the_share_of_changes_has_wilsons_interval() -> None:
    from scipy.stats import binomtest

    expected = binomtest(3, 200).proportion_ci(method="wilson")
    assert wilson(3, 200) == pytest.approx((expected.low, expected.high))
