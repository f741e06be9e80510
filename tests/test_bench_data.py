"""`vitrail bench data`: that all sides do the same work, and that the numbers are what they say."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitrail.benchmark import pipelines
from vitrail.benchmark.crops import BLOCK, Measured, Worker
from vitrail.benchmark.pipelines import LIBRARIES
from vitrail.commands.bench_data import Settings, drawn, measure, run, sentences, summary
from vitrail.commands.flags import parse
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.data import splits
from vitrail.data.pack import pack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    y, x = np.mgrid[0:1:120j, 0:1:160j][..., None]
    for number in range(6):
        shade = 128 + 100 * np.sin(3 * x + number + np.arange(3)) * np.cos(2 * y)
        path = root / "ab"[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(shade.astype(np.uint8)).save(path, quality=95, subsampling=0)
    return root


@pytest.fixture
def packed(folder: Path, tmp_path: Path) -> Path:
    pack(splits.read(str(folder)), "", tmp_path / "packed", 60, 1, lambda done: None)
    return tmp_path / "packed"


def test_all_sides_give_the_same_pictures(folder: Path, packed: Path) -> None:
    """But for the flips: of each picture the plain one or its mirror image, to a few levels of 255."""
    source, ours = (splits.open_data(str(path), validation=0.0).train for path in (folder, packed))
    found = Measured(source, ours, 40).here()
    assert set(found) == {f"{kind} {each}" for kind in ("vitrail", "packed") for each in LIBRARIES.values()} | set(
        LIBRARIES
    )
    preprocess = Preprocess((40, 40), None, "bilinear", pipelines.MEAN, pipelines.DEVIATION)
    flips = set()
    for number in range(2):
        batches = {name: side(number) for name, side in found.items()}
        assert batches["torchvision"].dtype == torch.float32
        assert all(batch.dtype == torch.uint8 for name, batch in batches.items() if name != "torchvision")
        for library, interpolation in LIBRARIES.items():
            theirs = batches[library] if library == "torchvision" else preprocess.normalize(batches[library])
            for kind in ("vitrail", "packed"):
                mine = preprocess.normalize(batches[f"{kind} {interpolation}"])
                assert mine.shape == theirs.shape == (BLOCK, 3, 40, 40)
                for one, other in zip(mine, theirs, strict=True):
                    differences = [float((turned - other).abs().mean()) for turned in (one, one.flip(-1))]
                    flips.add(differences[0] < differences[1])
                    assert min(differences) < (0.02 if kind == "vitrail" else 0.1)  # 0.02 is one level of 255
    assert flips == {True, False}


class Names:
    """A module that is not installed, with these names in it."""

    def __init__(self, **names: object) -> None:
        self.__dict__.update(names)


class Cropping:
    """As the two libraries have it: the crop is drawn by a method of the transform's own."""

    def __init__(self, size: int, kernel: Image.Resampling) -> None:
        self.size, self.kernel = size, kernel

    def get_params(self, image: Image.Image, scale: object, ratio: object) -> tuple[int, int, int, int]:
        raise AssertionError("another crop than the one that all sides take")

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = self.get_params(image, None, None)
        return image.crop((left, top, left + width, top + height)).resize((self.size, self.size), self.kernel)


class Steps:
    def __init__(self, transforms: list) -> None:
        self.transforms = transforms

    def __call__(self, image: Image.Image) -> object:
        for one in self.transforms:
            image = one(image)
        return image


def test_the_libraries_own_transforms_are_given_the_same_crops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither can be imported here: what stands in for them crops, and turns into pixels, as they do, without flips."""

    def planes(image: Image.Image) -> np.ndarray:
        return np.asarray(image).transpose(2, 0, 1).copy()

    def normal(pixels: torch.Tensor) -> torch.Tensor:
        mean, deviation = (torch.tensor(each)[:, None, None] for each in (pipelines.MEAN, pipelines.DEVIATION))
        return (pixels - mean) / deviation

    def create_transform(shape: tuple[int, int, int], interpolation: str, **_: object) -> Steps:
        return Steps([Cropping(shape[1], Image.Resampling[interpolation.upper()]), planes])

    modules = {
        "torchvision.transforms": Names(
            RandomResizedCrop=lambda size: Cropping(size, Image.Resampling.BILINEAR),
            RandomHorizontalFlip=lambda: lambda image: image,
            ToTensor=lambda: lambda image: torch.from_numpy(planes(image)).float() / 255,
            Normalize=lambda mean, deviation: normal,
            Compose=Steps,
        ),
        "timm.data": Names(create_transform=create_transform),
        "timm.data.loader": Names(
            fast_collate=lambda pairs: (torch.stack([torch.from_numpy(pair[0]) for pair in pairs]), None)
        ),
    }
    monkeypatch.setattr(pipelines.importlib, "import_module", modules.__getitem__)
    source = splits.open_data(str(folder), validation=0.0).train
    found = Measured(source, None, 40, ("torchvision", "timm")).here()
    for number in range(2):
        for library in LIBRARIES:
            own, again = found[f"{library} itself"](number), found[library](number)
            assert own.shape == again.shape
            assert own.dtype == again.dtype
            for one, other in zip(own.float(), again.float(), strict=True):
                assert any(torch.allclose(turned, other, atol=1e-5) for turned in (one, one.flip(-1)))
    result = summary({name: np.full(3, 1.0 if "vitrail" in name else 2.5) for name in found}, BLOCK)
    assert result["ratios"]["vitrail bicubic against timm itself"]["value"] == 2.5


class Slow:
    """A source whose pictures take this many seconds of a processor each, where they are prepared."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(torch.utils.data.DataLoader(self, batch_size=4, num_workers=1, sampler=range(10**6)))

    def __getitem__(self, place: int) -> int:
        end = time.process_time() + self.seconds
        while time.process_time() < end:
            pass
        return place


def test_what_a_worker_uses_is_counted_for_its_side_alone() -> None:
    seen: list[torch.Tensor] = []
    sides = {"slow": Worker(Slow(0.01), 3, seen.append), "quick": Worker(Slow(0.002), 3)}
    times = measure(sides, 1.0)
    assert [batch.tolist() for batch in seen[:2]] == [[4, 5, 6, 7], [8, 9, 10, 11]]  # the first came as it started
    assert 0.12 < np.median(times["slow"]) < 0.16
    assert 0.024 < np.median(times["quick"]) < 0.06


def test_through_a_worker(folder: Path, packed: Path) -> None:
    source, ours = (splits.open_data(str(path), validation=0.0).train for path in (folder, packed))
    found = Measured(source, ours, 40, batch=4, turn=2).through_a_worker()
    assert set(found) == {f"{kind} {each}" for kind in ("vitrail", "packed") for each in LIBRARIES.values()} | set(
        LIBRARIES
    )
    for name, side in found.items():
        assert isinstance(side, Worker)
        batch = next(side.batches)
        pixels = batch if name in LIBRARIES else batch.views[0]
        assert pixels.shape == (4, 3, 40, 40)
        assert pixels.dtype == (torch.float32 if name == "torchvision" else torch.uint8)
        assert len({tuple(each.flatten()[:40].tolist()) for each in pixels}) == 4


def test_it_runs(folder: Path, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    settings = Settings(
        str(folder), str(packed), "ViT-Ti/16", 32, 0.05, batch=4, workers=1, precision="fp32", device="cpu"
    )
    assert run(settings) == 0
    said = capsys.readouterr().out
    assert "pictures per core-second" in said
    assert "packed bicubic against timm" in said
    assert "Training ViT-Ti/16 on packed pictures is " in said
    (folder / "a" / "bad.jpg").write_bytes(b"not a picture")
    out = folder.parent / "out"
    flags = ["--data", str(folder), "--size", "32", "--seconds", "0.05"]
    flags += ["--json", str(out / "data.json"), "--plot", str(out / "data.png")]
    assert run(parse(Settings, flags, "bench data")) == 0
    assert "pictures per core-second" in capsys.readouterr().out
    assert (out / "data.png").stat().st_size > 5000
    record = json.loads((out / "data.json").read_text())
    assert record["command"] == "vitrail bench data --data photos --size 32 --seconds 0.05"
    assert record["machine"]["cores"] >= 1
    (result,) = record["runs"]
    assert str(folder.parent) not in json.dumps(record)
    assert (result["pictures"], result["unreadable"]) == (6, 1)
    assert result["turns"] >= 2
    assert set(result["through a worker"]["ratios"]) == set(result["ratios"])
    assert set(result["ratios"]) == {"vitrail bilinear against torchvision", "vitrail bicubic against timm"}
    for ratio in result["ratios"].values():
        assert ratio["low"] <= ratio["value"] <= ratio["high"]
    assert set(result["machine_use"]) == {"idle", "others_share", "load_before"}
    assert torch.get_num_threads() == threads


def test_what_cannot_be_measured(folder: Path, packed: Path) -> None:
    with pytest.raises(UserError, match="--size"):
        run(Settings(str(folder), size=0))
    with pytest.raises(UserError, match="--workers"):
        run(Settings(str(folder), workers=-1))
    with pytest.raises(UserError, match="--against transformers is not known; give torchvision or timm"):
        run(Settings(str(folder), against="transformers"))
    (folder / "a" / "0.jpg").rename(folder / "a" / "other.jpg")
    with pytest.raises(UserError, match="holds other pictures"):
        run(Settings(str(folder), str(packed)))
    with pytest.raises(UserError, match="ViT-Q"):
        run(Settings(str(folder), model="ViT-Q/16", size=32, seconds=0.05))
    for path in folder.rglob("*.jpg"):
        path.write_bytes(b"rubbish")
    with pytest.raises(UserError, match="none of the 6 pictures tried"):
        run(Settings(str(folder)))


def test_summary() -> None:
    rng = np.random.default_rng(0)
    times = {"torchvision": rng.uniform(1.8, 2.2, 50), "timm": rng.uniform(2.7, 3.3, 50)}
    times |= {"vitrail bilinear": rng.uniform(0.9, 1.1, 50), "vitrail bicubic": rng.uniform(0.9, 1.1, 50)}
    result = summary(times, BLOCK)
    assert result["turns"] == 50
    assert result["rates"]["vitrail bilinear"] == pytest.approx(BLOCK, rel=0.05)
    for name, wanted in (("vitrail bilinear against torchvision", 2), ("vitrail bicubic against timm", 3)):
        ratio = result["ratios"][name]
        assert ratio["low"] < ratio["value"] < ratio["high"]
        assert ratio["value"] == pytest.approx(wanted, rel=0.05)
        assert ratio["high"] - ratio["low"] < 0.2
    shown = {line["side"]: line for line in drawn({**times, "packed bilinear": times["timm"]}, 224)["lines"]}
    assert shown["torchvision"]["speedup"] == {"value": 1, "low": 1, "high": 1}
    assert shown["vitrail bilinear"]["speedup"] == result["ratios"]["vitrail bilinear against torchvision"]
    assert "vitrail packed bilinear" in shown


def test_what_is_said_of_training() -> None:
    result = {"size": 224, "turns": 3, "rates": {}, "ratios": {}, "unreadable": 0}
    result["machine_use"] = {"idle": True, "others_share": 0.0, "load_before": 0.0}
    found = {"model": "ViT-S/16", "workers": 8, "step": 2000.0, "input": 500.0}
    found |= {"device": "cuda", "waits": 0.75, "bound": True}
    (_, said) = sentences({**result, "training": found})
    assert "is bound by input: it would wait for 75% of its time (8 workers give 500 pictures a second" in said
    found |= {"input": 5000.0, "waits": 0.0, "bound": False}
    assert (
        "is not bound by input: there are 2.5 times as many as it takes" in sentences({**result, "training": found})[1]
    )
    found |= {"device": "cpu", "step": 8.0, "waits": 0.013}
    assert "on the same cores, preparing them takes 1.3% of the time" in sentences({**result, "training": found})[1]
