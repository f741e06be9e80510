"""Packing: the same data in the same order as the files, the same pixels where nothing was shrunk, and bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vitrail.commands import pack as command
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess, Source
from vitrail.data import pack as packing
from vitrail.data import shards, splits, unlabelled
from vitrail.data.decode import Shrunk, UnreadablePicture, decode
from vitrail.data.loader import Order, PictureLoader
from vitrail.data.pack import estimate, pack, refuse_if_full, target
from vitrail.data.sources import key
from vitrail.data.survey import survey
from vitrail.data.transforms import Transform

SIZE = 40


def picture(height: int, width: int, seed: int) -> np.ndarray:
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j][..., None]
    phase = np.random.default_rng(seed).uniform(0, 6, 3)
    return (128 + 100 * np.sin(5 * x + phase) * np.cos(4 * y + phase)).astype(np.uint8)


def stored(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    file = BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Small and large, colour and grey, upright and turned, equal ones in two places, and two that cannot be read."""
    root = tmp_path / "photos"
    turned = Image.Exif()
    turned[0x0112] = 6
    for number in range(24):
        path = root / ("train" if number < 18 else "val") / ("cat", "dög")[number % 2] / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = [(30, 50), (40, 40), (120, 90), (64, 100)][number % 4]
        options = {"exif": turned} if number % 5 == 0 else {}
        path.write_bytes(stored(picture(height, width, number), "JPEG", quality=95, **options))
    cats = root / "train" / "cat"
    (cats / "grey.png").write_bytes(stored(picture(30, 30, 5)[:, :, 0], "PNG"))
    (cats / "twin.jpg").write_bytes((cats / "0.jpg").read_bytes())
    (cats / "bad.jpg").write_bytes(b"no picture at all")
    (root / "val" / "dög" / "cut.jpg").write_bytes((cats / "2.jpg").read_bytes()[:500])
    return root


def packed(folder: Path, out: Path, size: int = SIZE, workers: int = 1) -> dict[str, object]:
    return pack(splits.read(str(folder)), str(folder), out, size, workers, lambda done: None)


def pixels_of(source: Source, index: int) -> np.ndarray:
    return np.asarray(decode(source[index].picture))


def test_the_same_data_in_the_same_order(folder: Path, tmp_path: Path) -> None:
    """Names, labels, the held-out pictures, the order of every epoch, the unreadable; and the crops as near as stored."""
    packed(folder, tmp_path / "packed")
    shutil.move(folder / "val", tmp_path / "test")  # so that a validation split is made
    shutil.rmtree(tmp_path / "packed")
    packed(folder, tmp_path / "packed")
    for seed in (0, 1):
        files = splits.open_data(str(folder), validation=0.3, seed=seed)
        ours = splits.open_data(str(tmp_path / "packed"), validation=0.3, seed=seed)
        assert ours.made
        for mine, theirs in ((ours.train, files.train), (ours.validation, files.validation)):
            assert mine is not None
            assert theirs is not None
            assert mine.classes == theirs.classes == ("cat", "dög")
            assert np.array_equal(mine.labels, theirs.labels)
            assert [key(mine, at) for at in range(len(mine))] == [key(theirs, at) for at in range(len(theirs))]
    order = Order(len(files.train), 5, 3 * len(files.train), seed=3)
    transform = Transform(Preprocess((24, 24)), "inception")
    seen = []
    for source in (files.train, ours.train):
        loader = PictureLoader(source, transform, order, said=set())
        batches = list(loader)
        seen.append((batches, sorted(loader.problems)))
    assert seen[0][1] == seen[1][1]
    for theirs, mine in zip(seen[0][0], seen[1][0], strict=True):
        assert np.array_equal(mine.index, theirs.index)
        assert np.array_equal(mine.valid, theirs.valid)
        assert np.array_equal(mine.targets.values, theirs.targets.values)
        for row, at in enumerate(mine.index.tolist()):
            if at >= 0 and mine.valid[row]:
                difference = np.abs(mine.views[0][row].numpy().astype(int) - theirs.views[0][row].numpy()).mean()
                whole = not isinstance(ours.train[at].picture, Shrunk)
                assert difference == 0 if whole else difference < 6


def test_pixels_are_the_files_or_shrunk_once(folder: Path, tmp_path: Path) -> None:
    made = packed(folder, tmp_path / "packed", workers=2)
    files, notes = splits.read(str(folder))
    ours, more = splits.read(str(tmp_path / "packed"))
    assert (list(files), notes) == (list(ours), more)
    shapes = set()
    for split, source in files.items():
        for index in range(len(source)):
            if key(source, index).endswith(("bad.jpg", "cut.jpg")):
                said = []
                for each in (source, ours[split]):
                    with pytest.raises(UnreadablePicture) as error:
                        decode(each[index].picture, name="this")
                    said.append(str(error.value))
                assert said[0] == said[1]
                continue
            wanted = decode(source[index].picture)
            shrunk = target((wanted.height, wanted.width), SIZE)
            got = pixels_of(ours[split], index)
            assert got.shape == (*shrunk, 3)
            if shrunk == (wanted.height, wanted.width):
                assert np.array_equal(got, wanted)
            else:
                assert min(shrunk) == SIZE
                kept = np.asarray(wanted.resize(shrunk[::-1], Image.Resampling.BICUBIC)).astype(int)
                assert np.abs(got - kept).mean() < 0.6
            shapes.add(shrunk)
    assert len(shapes) == 8
    assert {split: len(lost) for split, lost in made["lost"].items()} == {"train": 1, "validation": 1}
    assert "no picture of a format known here" in made["lost"]["train"][0]["reason"]
    assert np.asarray(ours["train"][key_at(ours["train"], "cat/grey.png")].picture).ndim == 2


def key_at(source: Source, name: str) -> int:
    return next(index for index in range(len(source)) if key(source, index).endswith(name))


def test_it_is_read_wherever_data_are(folder: Path, tmp_path: Path) -> None:
    packed(folder, tmp_path / "packed")
    without = unlabelled.open_pictures(str(tmp_path / "packed"), validation=0.0)
    assert len(without.train) == 21
    assert set(without.train.labels.tolist()) == {-1}
    seen = survey(splits.open_data(str(tmp_path / "packed")))
    assert {item.split for item in seen.unreadable} == {"train", "validation"}
    assert any(pair.exact for pair in seen.pairs) == any(
        pair.exact for pair in survey(splits.open_data(str(folder))).pairs
    )
    batches = list(
        PictureLoader(
            splits.read(str(tmp_path / "packed"))[0]["validation"],
            Transform(Preprocess((24, 24), 32)),
            Order(7, 4, 7, shuffle=False),
            workers=1,
        )
    )
    assert sum(int(batch.valid.sum()) for batch in batches) == 6


def test_evaluation_crops_lie_as_in_the_files(tmp_path: Path) -> None:
    """A picture's own size is what the crop is taken by, though 41 x 55 pixels of it are stored."""
    pixels = picture(120, 161, 0)
    shrunk = Shrunk.of(np.array(Image.fromarray(pixels).resize((55, 41), Image.Resampling.BICUBIC)), (120, 161))
    for preprocess in (Preprocess((32, 32), 36), Preprocess((32, 32))):
        near = Transform(preprocess)(shrunk, None).astype(int) - Transform(preprocess)(pixels, None)
        assert np.abs(near).mean() < 1.5


def test_it_goes_on_after_a_kill(folder: Path, tmp_path: Path) -> None:
    """Killed in the middle; then the same command keeps what is whole, and the result is that of one go."""
    out, script = tmp_path / "packed", tmp_path / "slow.py"
    script.write_text(
        "import sys, time\n"
        "from pathlib import Path\n"
        "from vitrail.data import pack, shards, splits\n"
        "shards.SHARD = pack.SHARD = 4\n"
        "def slow(done):\n"
        "    if done == 11: time.sleep(60)\n"
        f"pack.pack(splits.read({str(folder)!r}), 'x', Path({str(out)!r}), {SIZE}, 1, slow)\n"
    )
    process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "OMP_NUM_THREADS": "1"})
    end = time.monotonic() + 60
    while not (out / "train-00002.pixels.part").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with pytest.raises(UserError, match="not packed to its end"):
        splits.read(str(out))
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("*.pixels")}
    assert set(before) == {"train-00000.pixels", "train-00001.pixels"}
    done: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SHARD", 4)
        patch.setattr(shards, "SHARD", 4)
        pack(splits.read(str(folder)), "x", out, SIZE, 1, done.append)
        assert done[0] == 8
        assert done[-1] == 28
        assert all((out / name).stat().st_mtime_ns == then for name, then in before.items())
        again, _ = splits.read(str(out))
        pack(splits.read(str(folder)), "x", tmp_path / "whole", SIZE, 2, done.append)
        once, _ = splits.read(str(tmp_path / "whole"))
        for split, source in once.items():
            assert source.fingerprint == again[split].fingerprint
            assert all(
                np.array_equal(
                    np.frombuffer(_raw(source, at), np.uint8), np.frombuffer(_raw(again[split], at), np.uint8)
                )
                for at in range(len(source))
            )


def _raw(source: Source, index: int) -> bytes:
    got = source[index].picture
    return got if isinstance(got, bytes) else np.asarray(got).tobytes()


def test_a_pack_that_is_not_whole(folder: Path, tmp_path: Path) -> None:
    """Cut, missing, damaged: one sentence with the file's name; the same command mends it and keeps the rest."""
    out = tmp_path / "packed"
    packed(folder, out)
    pixels = out / "train-00000.pixels"
    for harm in (
        lambda: os.truncate(pixels, pixels.stat().st_size // 2),
        lambda: pixels.unlink(),
        lambda: pixels.with_suffix(".npz").unlink(),
        lambda: pixels.with_suffix(".npz").write_bytes(b"rubbish"),
        lambda: (out / "train.npz").write_bytes((out / "train.npz").read_bytes()[:200]),
        lambda: (out / "train.npz").unlink(),
    ):
        harm()
        with pytest.raises(UserError, match=r"train.*run the same vitrail pack again"):
            splits.read(str(out))
        kept = (out / "validation-00000.pixels").stat().st_mtime_ns
        packed(folder, out)
        assert (out / "validation-00000.pixels").stat().st_mtime_ns == kept
        shards._mapped.cache_clear()
        assert len(splits.read(str(out))[0]["train"]) == 21
    description = json.loads((out / "pack.json").read_text())
    (out / "pack.json").write_text(json.dumps({**description, "format": 9}))
    for ask in (lambda: splits.read(str(out)), lambda: packed(folder, out)):
        with pytest.raises(UserError, match="format 9"):
            ask()
    for text in ("{", "[]", "{}", '{"format": 1}'):
        (out / "pack.json").write_text(text)
        with pytest.raises(UserError, match=r"pack\.json cannot be read"):
            splits.read(str(out))


def test_targets_that_are_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "packed"
    packed(folder, out)
    with pytest.raises(UserError, match="another --size"):
        packed(folder, out, size=30)
    (folder / "train" / "cat" / "2.jpg").unlink()
    with pytest.raises(UserError, match="other data, or the data have changed"):
        packed(folder, out)
    with pytest.raises(UserError, match="is not empty"):
        packed(folder, folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is not empty"):
        packed(folder, tmp_path / "file")
    with pytest.raises(UserError, match="--size is 0"):
        packed(folder, tmp_path / "other", size=0)
    for path in folder.rglob("*.*"):
        path.write_bytes(b"rubbish")
    with pytest.raises(UserError, match="none of its 27 pictures can be read"):
        packed(folder, tmp_path / "rubbish")


def test_no_space(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is written, from the headers of some; and what there is for the rest of a pack counts."""
    sources, _ = splits.read(str(folder))
    needed = estimate(sources, SIZE)
    packed(folder, tmp_path / "packed")
    taken = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.pixels"))
    assert abs(needed - taken) < 0.15 * taken
    free = refuse_if_full(tmp_path / "new", needed)
    assert free > needed
    with pytest.raises(UserError, match=r"would need about .* GB more, and .* GB are free"):
        refuse_if_full(tmp_path / "new", free + (1 << 40))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "pixels_of", full)
    with pytest.raises(UserError, match=r"no space is left on the disk.*free some space"):
        packed(folder, tmp_path / "full")
    assert not list((tmp_path / "full").glob("*.part"))


def test_the_verb(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "packed"
    assert command.run(command.Settings(str(folder), out, SIZE, 1)) == 0
    said = capsys.readouterr()
    assert "28 pictures" in said.out
    assert "2 of them cannot be read" in said.out
    assert "GB are free" in said.err
    assert command.run(command.Settings(str(folder), out, SIZE, 1, json=True)) == 0
    assert json.loads(capsys.readouterr().out)["complete"] is True
    with pytest.raises(UserError, match="packed folder already"):
        command.run(command.Settings(str(out), tmp_path / "twice"))
    with pytest.raises(UserError, match="lies inside"):
        command.run(command.Settings(str(folder), folder / "packed"))
    with pytest.raises(UserError, match="--workers"):
        command.run(command.Settings(str(folder), out, workers=0))
