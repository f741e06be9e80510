"""`vitrail bench data`: that both sides do the same work, and that the numbers are what they say."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.commands.bench_data import BLOCK, Settings, plain_pipeline, run, summary
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.data.transforms import Transform


def folder(root: Path) -> Path:
    y, x = np.mgrid[0:1:120j, 0:1:160j][..., None]
    for number in range(6):
        shade = 128 + 100 * np.sin(3 * x + number + np.arange(3)) * np.cos(2 * y)
        path = root / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shade.astype(np.uint8)).save(path, quality=95, subsampling=0)
    return root


def test_both_pipelines_give_the_same_picture(tmp_path: Path) -> None:
    preprocess = Preprocess((40, 40))
    transform = Transform(preprocess, "inception")
    for path in sorted(folder(tmp_path).rglob("*.jpg")):
        for seed in range(5):
            ours = transform(path, np.random.default_rng(seed))
            ours = preprocess.normalize(torch.from_numpy(ours)[None])[0]
            plain = plain_pipeline(path, transform, np.random.default_rng(seed))
            assert plain.dtype == torch.float32
            assert float((ours - plain).abs().mean()) < 0.02  # 2.5 levels of 255; borders and reduced decoding differ


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder(tmp_path)
    (tmp_path / "a" / "bad.jpg").write_bytes(b"not a picture")
    threads = torch.get_num_threads()
    assert run(Settings(str(tmp_path), size=32, seconds=0.05, json=True)) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["pictures"] == 6
    assert result["unreadable"] == 1
    assert result["blocks"] >= 2
    assert result["low"] <= result["ratio"] <= result["high"]
    assert run(Settings(str(tmp_path), size=32, seconds=0.05)) == 0
    said = capsys.readouterr().out
    assert "pictures per core-second" in said
    assert "1 of 7 pictures cannot be read" in said
    assert torch.get_num_threads() == threads
    with pytest.raises(UserError, match="--size"):
        run(Settings(str(tmp_path), size=0))


def test_summary() -> None:
    rng = np.random.default_rng(0)
    times = np.stack([rng.uniform(0.9, 1.1, 50), rng.uniform(1.8, 2.2, 50)], 1)
    result = summary(times)
    assert abs(result["ours"] - BLOCK) < 1
    assert abs(result["plain"] - BLOCK / 2) < 0.5
    assert 1.9 < result["low"] < 2 < result["high"] < 2.1
