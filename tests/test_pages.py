"""What docs/ says of results: where a peer is clearly ahead, and which pictures the baselines learn from."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import vitrail

ROOT = Path(__file__).parents[1]


def script(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def side(name: str, seconds: list[float]) -> dict[str, Any]:
    rates = sorted(1 / taken for taken in seconds)
    middle = rates[len(rates) // 2]
    return {
        **{"side": name, "precision": "fp32", "seconds": seconds, "rate": middle, "low": rates[1], "high": rates[-2]},
        **{"speedup": {"value": 1.0, "low": 0.9, "high": 1.1}, "chosen": "", "peak": None, "share": None},
    }


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        # The machine drifts by far more than the 5 % that lie between the two in every round.
        ([1.05] * 9, "is 5.0% ahead of vitrail eager fp32 (clearly)"),
        (
            [1.3, 1.0, 1.2, 0.85, 1.1, 0.9, 1.2, 1.02, 0.95],
            "ahead of vitrail eager fp32 (within the noise of this run)",
        ),
    ],
    ids=["in every round", "now and then"],
)
def test_a_peer_is_clearly_ahead_where_the_interval_of_the_ratio_says_so(factors: list[float], said: str) -> None:
    drift = [1.0, 1.3, 1.1, 1.5, 1.2, 1.4, 1.15, 1.25, 1.35]
    slower = [taken * factor for taken, factor in zip(drift, factors, strict=True)]
    lines = [side("timm eager fp32", drift), side("vitrail eager fp32", slower)]
    assert lines[0]["low"] < lines[1]["high"]
    record = {"runs": [{"what": {"model": "ViT-S/16", "batch": 8}, "lines": lines}]}
    _, found = script("bench/speed_page.py").ahead({"one": record})
    assert said in found


def test_the_page_on_speed_is_what_the_script_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["speed_page.py", "--out", str(tmp_path / "speed.md")])
    assert script("bench/speed_page.py").main() == 0
    assert (tmp_path / "speed.md").read_text() == (ROOT / "docs" / "speed.md").read_text()


def test_the_baselines_learn_from_the_runs_own_training_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"data": {"origin": "sample:fashion"}, "settings": {"seed": 3, "validation": 0.05}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    asked: dict[str, Any] = {}

    def open_data(origin: str, **settings: Any) -> SimpleNamespace:
        asked.update(settings, origin=origin)
        return SimpleNamespace(test=None)

    drawing = script("scripts/make_pictures.py")
    monkeypatch.setattr(drawing, "open_data", open_data)
    monkeypatch.setattr(vitrail, "load", lambda run: SimpleNamespace(eval=lambda: None))
    monkeypatch.setattr(sys, "argv", ["make_pictures.py", str(tmp_path)])
    with pytest.raises(AssertionError, match="test split"):
        drawing.main()
    assert asked == {"origin": "sample:fashion", "seed": 3, "validation": 0.05}
