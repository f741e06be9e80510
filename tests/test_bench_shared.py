"""What vitrail bench's measurements share: turns, ratios, the idle check, records."""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from vitrail.analysis.figures import save
from vitrail.analysis.figures_speed import growth, speeds
from vitrail.benchmark import alternation, machine, peers, record
from vitrail.benchmark.machine import Others, matrix_products, pinned
from vitrail.benchmark.subject import subject
from vitrail.core.device import cores
from vitrail.core.errors import UserError
from vitrail.weights import zoo


def test_sides_take_turns_and_the_order_turns_round():
    called = []
    sides = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = alternation.alternate(sides, rounds=4, shortest=0.0)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}
    rounds = [called[start : start + 3] for start in range(0, 12, 3)]
    assert all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert rounds[1] == rounds[0][::-1]
    assert rounds[3] == rounds[2][::-1]


def test_quick_work_is_repeated_within_a_turn_and_told_once():
    counts = []
    alternation.alternate({"a": lambda: (counts.append(1), time.sleep(0.001))}, rounds=1, shortest=0.2)
    assert len(counts) > 3
    told = []
    alternation.alternate({"a": lambda: time.sleep(0.002)}, seconds=1.0, least=2, each=told.append, shortest=0.001)
    assert told == list(range(1, len(told) + 1))
    assert len(told) > 2


def test_waiting_for_a_device_is_part_of_a_turn_once():
    waited = []
    sides = {"a": lambda: time.sleep(0.001)}
    seconds = alternation.alternate(sides, rounds=1, shortest=0.05, finish=lambda: (waited.append(1), time.sleep(0.1)))
    assert len(waited) == 3  # twice before the first round
    assert seconds["a"][0] > 0.1  # a turn of one piece of work: 0.101 s is over the shortest already


def test_what_is_measured_has_answers_of_its_own():
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, second = subject("ViT-Nano/16", 32).eval()(images)
    assert (first - second).norm() > 0.1 * first.norm() > 0


def test_ratio_is_of_medians_and_covers_the_truth():
    random = np.random.default_rng(0)
    first, second = 2 + 0.1 * random.random(60), 1 + 0.05 * random.random(60)
    found = alternation.ratio(list(first), list(second))
    assert found.value == pytest.approx(np.median(first) / np.median(second))
    assert 1.9 < found.low < found.value < found.high < 2.1
    equal = alternation.ratio(list(first), list(first))
    assert equal == alternation.Ratio(1.0, 1.0, 1.0)


def test_ratio_keeps_rounds_together():
    """A disturbance that hits both sides of a round alike leaves the interval narrow."""
    drift = list(np.linspace(1, 3, 40))
    found = alternation.ratio([2 * value for value in drift], drift)
    assert (found.low, found.high) == pytest.approx((2.0, 2.0))


def test_pinned_threads_come_back():
    before = torch.get_num_threads()
    with pinned(1) as threads:
        assert threads == torch.get_num_threads() == cores() == 1
    assert torch.get_num_threads() == before
    with pytest.raises(UserError, match="--threads is 99999"), pinned(99999):
        pass


def test_matrix_rates_are_plausible():
    products = matrix_products(torch.device("cpu"), ("fp32", "bf16", "int8"), edge=256)
    assert {"matrix fp32", "matrix bf16"} <= set(products.sides)
    assert set(products.flops.values()) == {2 * 256**3}
    rates = products.rates(alternation.alternate(products.sides, rounds=2, shortest=0.001))
    assert rates.keys() == {name.removeprefix("matrix ") for name in products.sides}
    assert all(1e8 < rate < 1e14 for rate in rates.values())


def test_matrices_are_small_where_a_product_is_slow(monkeypatch: pytest.MonkeyPatch):
    """A processor that does 1 GFLOP/s in bf16 and 1,000 in fp32: 2048 x 2048 would take it 17 seconds."""
    clock = [0.0]
    monkeypatch.setattr(machine.time, "perf_counter", lambda: clock[0])

    def product(edge: int, precision: str, device: torch.device) -> alternation.Side:
        def side() -> None:
            clock[0] += 2 * edge**3 / (1e9 if precision == "bf16" else 1e12)

        return side

    monkeypatch.setattr(machine, "_product", product)
    products = matrix_products(torch.device("cpu"), ("fp32", "bf16"))
    assert products.flops == {"matrix fp32": 2 * 2048**3, "matrix bf16": 2 * 512**3}


def test_a_busy_machine_is_said():
    assert Others.sentence({"idle": True, "others_share": 0.0, "load_before": 0.0}) == ""
    said = Others.sentence({"idle": False, "others_share": 0.41, "load_before": 3.0})
    assert "41% of the processor" in said


def test_a_share_is_told_only_of_a_time_that_has_enough_ticks(monkeypatch: pytest.MonkeyPatch):
    """Others work one tick of 10 ms: over 1 ms nothing is said of it, over a second what it is."""
    clock = {"now": 100.0, "own": 5.0, "busy": 1000.0}
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machine.os, "sysconf", lambda _: 100)
    monkeypatch.setattr(machine.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(machine, "_own_seconds", lambda: clock["own"])
    monkeypatch.setattr(machine, "_busy_seconds", lambda: clock["busy"])
    others = Others()
    clock.update(now=100.001, busy=1000.01)
    assert others.share() is None
    assert others.result()["others_share"] is None
    clock.update(now=101.0, own=5.6, busy=1000.61)  # of 0.61 seconds 0.6 were our own work
    assert others.share() == pytest.approx(0.005)
    clock.update(busy=1010.0)
    assert others.share() == 1.0


def test_own_work_does_not_count_as_the_work_of_others():
    others, begun = Others(), time.process_time()
    while time.process_time() - begun < 1.0:
        sum(range(1000))
    share = others.share()
    if share is None:
        pytest.skip("this system does not say how busy it is")
    possible = (time.monotonic() - others._begun) * os.cpu_count()
    assert (
        share <= (machine._busy_seconds() - others._busy - 0.5) / possible
    )  # half a second: what clocks may disagree by


@pytest.mark.parametrize(
    ("name", "message"), [("numpy", "not known"), ("timm,", "cannot be imported"), ("jax", "not known")]
)
def test_peers_that_cannot_be_are_refused(name: str, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=message):
        peers.wanted(name)


def test_transformers_peer_is_the_same_size():
    config = zoo.config("ViT-Nano/16", (32, 32))
    model = peers.build("transformers", config, 10).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    ours = zoo.create("ViT-Nano/16", classes=10, image=(32, 32))
    count = [sum(p.numel() for p in each.parameters()) for each in (model, ours)]
    assert count[0] == count[1]


@pytest.mark.parametrize("name", ["R26+ViT-S/32", "BiT-R50x1"])
def test_what_no_peer_has_is_refused(name: str):
    with pytest.raises(UserError, match="plain ViTs"):
        peers.build("timm", zoo.config(name), 10)


@dataclass(frozen=True)
class _Settings:
    model: str
    batch: tuple[int, ...] = (8,)
    peaks: bool = True
    json: Path | None = None


def test_a_record_holds_its_command_and_no_absolute_path(tmp_path: Path):
    settings = _Settings(str(tmp_path / "w.safetensors"), (1, 2), False, tmp_path / "out.json")
    spoken = record.spoken("bench inference", settings)
    assert spoken == "vitrail bench inference --model w.safetensors --batch 1 2 --no-peaks"
    record.write(settings.json, record.stamped("x", {"command": spoken}))
    assert str(tmp_path) not in settings.json.read_text()
    with pytest.raises(UserError, match="cannot be written"):
        record.write(settings.json / "deeper.json", {})


def test_figures_are_drawn(tmp_path: Path):
    seconds = {"timm eager fp32": [2.0, 2.1, 2.0], "vitrail auto bf16": [1.0, 1.1, 1.0]}
    precisions = {side: side.split()[-1] for side in seconds}
    found = record.lines(seconds, precisions, "timm eager fp32", 8, 1e9, {"bf16": 2e9}, {}, {})
    assert found[1].rate == 8.0
    assert found[1].speedup.value == 2.0
    assert found[1].share == pytest.approx(0.5)
    assert found[0].share is None
    what = {"model": "ViT-B/16", "batch": 8, "size": 224, "threads": 2}
    run = record.Measured(what, "timm eager fp32", {"bf16": 2e9}, found)
    assert record.table(run).row_count == 2
    plain = json.loads(json.dumps({"what": what, "reference": run.reference, "lines": [
        {**vars(line), "speedup": vars(line.speedup)} for line in found]}))  # fmt: skip
    save(speeds([plain]), tmp_path / "a.png")
    points = [{"x": x, "seconds": x, "seconds_formula": x, "bytes": x, "bytes_formula": x} for x in (1.0, 2.0)]
    save(growth({"batch": points}, {"batch": "pictures"}), tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert (tmp_path / "b.png").stat().st_size > 5000
