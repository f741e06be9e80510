"""What is said of the pictures before training: on files made here, good, copied, damaged and hostile."""

import json
import os
import struct
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.fft import dctn

from vitrail.core.errors import UserError
from vitrail.core.types import Sample
from vitrail.data.likeness import edges, equal_pictures, look, near_pictures, perceptual_hash
from vitrail.data.sources import read_sample, sizes
from vitrail.data.splits import Splits, open_data
from vitrail.data.survey import Survey, refuse_if_unreadable, survey


def scene(seed: int, size: int = 160) -> Image.Image:
    """A picture with the statistics of a photograph: amplitude falls as one over frequency; in colour."""
    rng = np.random.default_rng(seed)
    across, down = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size))
    falloff = 1 / np.maximum(np.hypot(across, down), 1 / size)
    planes = []
    for _ in range(3):
        wave = np.fft.ifft2(np.fft.fft2(rng.standard_normal((size, size))) * falloff).real
        planes.append(127 + 50 * wave / wave.std())
    return Image.fromarray(np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8))


def folder(root: Path, **splits: dict[str, list[Image.Image]]) -> Path:
    for split, classes in splits.items():
        for name, pictures in classes.items():
            (root / split / name).mkdir(parents=True)
            for number, picture in enumerate(pictures):
                picture.save(root / split / name / f"{split}{number}.png")
    return root


def scenes(first: int, count: int, size: int = 64) -> list[Image.Image]:
    return [scene(first + number, size) for number in range(count)]


def looked(root: Path, **options: object) -> Survey:
    return survey(open_data(str(root)), **options)  # type: ignore[arg-type]


def test_clean_data(tmp_path: Path) -> None:
    found = looked(folder(tmp_path, train={"a": scenes(0, 6), "b": scenes(10, 3)}, val={"a": scenes(20, 2)}))
    assert found.counts == {"train": {"a": 6, "b": 3}, "validation": {"a": 2, "b": 0}}
    assert (found.imbalance, found.unreadable, found.pairs) == (2.0, (), ())
    assert (found.looked_at, found.pictures) == (11, 11)
    said = found.lines()
    assert said[0] == "train: 9 pictures of 2 classes, from 3 (b) to 6"
    assert "note: validation has no pictures of b." in said
    assert said[-1].endswith("none unreadable, none twice.")
    refuse_if_unreadable(found, strict=True)
    assert json.loads(json.dumps(found.to_json()))["counts"]["train"] == {"a": 6, "b": 3}


def test_imbalance_is_said_with_the_flag(tmp_path: Path) -> None:
    found = looked(folder(tmp_path, train={"a": scenes(0, 12), "b": scenes(20, 2)}))
    assert found.imbalance == 11.0  # one of each class is held out
    assert any("11 times" in line and "--balance" in line for line in found.lines())


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A PNG of 100 bytes that says it holds 20,000 x 20,000 pixels."""
    head = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """100 good pictures and one of each kind of bad one, and a PNG that is only named .jpg, which is fine."""
    good = scenes(0, 60, 32)
    root = folder(tmp_path / "data", train={"a": good[:30], "b": good[30:]}, val={"a": scenes(100, 40, 32)})
    bad = root / "train" / "a"
    scene(900).save(bad / "cut.jpg")
    (bad / "cut.jpg").write_bytes((bad / "cut.jpg").read_bytes()[:-2000])
    (bad / "empty.png").write_bytes(b"")
    (bad / "text.jpg").write_text("this is no picture, whatever its name says")
    (bad / "bomb.png").write_bytes(bomb())
    (bad / "dead.png").symlink_to(tmp_path / "gone.png")
    scene(901, 32).save(bad / "png_in_truth.jpg", "PNG")
    return root


REASONS = {
    "bomb.png": "bomb",
    "cut.jpg": "truncated",
    "dead.png": "No such file",
    "empty.png": "empty",
    "text.jpg": "no picture",
}


def test_each_unreadable_picture_is_named_once_with_its_reason(damaged: Path) -> None:
    found = looked(damaged)
    assert {Path(item.name).name for item in found.unreadable} == set(REASONS)
    for item in found.unreadable:
        assert item.split == "train"
        assert item.name in item.reason
        assert REASONS[Path(item.name).name] in item.reason
    said = "\n".join(found.lines())
    assert all(said.count(item.name) == 1 for item in found.unreadable)
    assert "5 of 106 pictures (4.7%) cannot be read and are left out" in said
    assert found.looked_at == 106


def test_more_than_five_percent_unreadable_is_refused_with_the_list(damaged: Path) -> None:
    found = looked(damaged)
    refuse_if_unreadable(found, strict=False)
    with pytest.raises(UserError, match=r"--strict: .*bomb\.png"):
        refuse_if_unreadable(found, strict=True)
    (damaged / "train" / "b" / "more.gif").write_bytes(b"GIF89a")
    with pytest.raises(UserError) as error:
        refuse_if_unreadable(looked(damaged), strict=False)
    assert str(error.value).startswith("6 of 107 pictures (5.6%) cannot be read, more than 5%")
    for name in (*REASONS, "more.gif"):
        assert name in str(error.value)


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="POSIX permissions")
def test_picture_without_permission() -> None:
    with tempfile.TemporaryDirectory() as open_to_all:  # pytest's own folders may be entered by their owner alone
        root = folder(Path(open_to_all), train={"a": scenes(0, 2, 32), "b": scenes(5, 2, 32)})
        root.chmod(0o755)
        splits = open_data(str(root), validation=0.0)
        assert survey(splits).unreadable == ()  # all imports are done, as the user whose they are
        forbidden = next((root / "train" / "b").iterdir())
        forbidden.chmod(0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may read everything; nobody may not
        try:
            found = survey(splits)
        finally:
            os.seteuid(user)
    assert [item.name for item in found.unreadable] == [str(forbidden)]
    assert "Permission denied" in found.unreadable[0].reason


def copies(picture: Image.Image, root: Path) -> dict[str, Image.Image]:
    made = {
        "half": picture.resize((80, 80)),
        "double": picture.resize((320, 320)),
        "squeezed": picture.resize((128, 96)),
    }
    made["grey"] = picture.convert("L").convert("RGB")
    made["brighter"] = ImageEnhance.Brightness(picture).enhance(1.2)
    made["few colours"] = picture.quantize(64).convert("RGB")
    for kind, quality in (("JPEG", 75), ("JPEG", 20), ("WEBP", 40)):
        picture.save(root / "copy", kind, quality=quality)
        made[f"{kind} {quality}"] = Image.open(root / "copy").convert("RGB")
    return made


def test_near_duplicates_are_copies_and_nothing_else(tmp_path: Path) -> None:
    originals = scenes(0, 60, 160)
    kinds = [copies(picture, tmp_path) for picture in originals]
    others = np.stack([look(picture) for picture in originals])
    everything = lambda i, j: np.ones(len(i), bool)  # noqa: E731
    assert near_pictures(others, everything) == []
    for kind in kinds[0]:
        both = np.concatenate([others, np.stack([look(made[kind]) for made in kinds])])
        found = near_pictures(both, everything)
        assert set(found) <= {(number, number + 60) for number in range(60)}, kind
        assert len(found) >= 57, kind


def test_perceptual_hash_against_scipy() -> None:
    looks = np.stack([look(picture) for picture in scenes(0, 20, 64)])
    expected = dctn(looks.astype(np.float64), axes=(1, 2), norm="ortho")[:, :8, :8].reshape(20, 64) > 0
    expected[:, 0] = False
    assert (perceptual_hash(looks) != expected).sum() == 0


def test_search_finds_all_pairs_that_plain_comparison_finds() -> None:
    rng = np.random.default_rng(0)
    base = np.stack([look(picture) for picture in scenes(0, 300, 48)])
    noisy = np.clip(base.astype(int) + rng.integers(-10, 11, base.shape), 0, 255).astype(np.uint8)
    looks = np.concatenate([base, noisy])[rng.permutation(600)]
    bits = (perceptual_hash(looks)[:, None] != perceptual_hash(looks)[None]).sum(-1)
    alike = edges(looks) @ edges(looks).T
    expected = {(i, j) for i, j in np.argwhere((bits <= 8) & (alike >= 0.93)).tolist() if i < j}
    assert len(expected) > 100
    assert set(near_pictures(looks, lambda i, j: np.ones(len(i), bool))) == expected
    odd = {(i, j) for i, j in expected if (i + j) % 2}
    assert set(near_pictures(looks, lambda i, j: (i + j) % 2 == 1)) == odd


def test_flat_pictures_are_like_none() -> None:
    rng = np.random.default_rng(0)
    flat = np.repeat(np.arange(0, 200, 10, dtype=np.uint8), 32 * 32).reshape(-1, 32, 32)
    grain = (128 + rng.integers(-2, 3, (20, 32, 32))).astype(np.uint8)
    ramp = np.broadcast_to(np.arange(32, dtype=np.uint8), (1, 32, 32))
    looks = np.concatenate([flat, grain, ramp])
    assert near_pictures(looks, lambda i, j: np.ones(len(i), bool)) == []
    assert near_pictures(flat[:0], lambda i, j: np.ones(len(i), bool)) == []


def test_copies_across_splits_and_classes_are_said(tmp_path: Path) -> None:
    train = scenes(0, 20)
    root = folder(tmp_path, train={"a": train[:10], "b": train[10:]}, val={"a": scenes(50, 3), "b": scenes(60, 3)})
    train[2].resize((200, 200)).convert("RGB").save(root / "val" / "a" / "resized.jpg", quality=80)
    data = (root / "train" / "b" / "train4.png").read_bytes()
    (root / "val" / "a" / "same.png").write_bytes(data)
    (root / "train" / "a" / "wrong.png").write_bytes(data)
    found = looked(root)
    pairs = {(pair.exact, *(Path(name).name for name in pair.names)): pair for pair in found.pairs}
    near, wrong = (False, "train2.png", "resized.jpg"), (True, "wrong.png", "train4.png")
    assert set(pairs) == {near, wrong, (True, "wrong.png", "same.png")}
    assert pairs[near].splits == ("train", "validation")
    assert pairs[wrong].classes == ("a", "b")
    said = "\n".join(found.lines())
    assert "1 pairs equal byte for byte lie in different splits" in said
    assert "1 pairs that look the same lie in different splits" in said
    assert "1 pairs equal byte for byte have different classes" in said
    json.dumps(found.to_json())


def test_many_copies_of_one_picture_make_few_pairs(tmp_path: Path) -> None:
    same = scenes(0, 1) * 30
    found = looked(folder(tmp_path, train={"a": same, "b": same}, val={"a": same}))
    assert 1 <= len(found.pairs) <= 3
    assert all(pair.exact for pair in found.pairs)


def test_equal_pictures_opens_no_more_than_it_must(tmp_path: Path) -> None:
    pictures = [b"a" * 9, b"b" * 9, b"c" * 8, b"b" * 9, b"x" * 5000 + b"1", b"x" * 5000 + b"2", b"", b""]
    opened = []

    def fetch(place: int) -> bytes:
        opened.append(place)
        return pictures[place]

    assert equal_pictures(np.array([len(p) for p in pictures]), fetch) == [[1, 3]]
    assert set(opened) == {0, 1, 3, 4, 5}
    assert equal_pictures(np.array([7, 7]), lambda place: tmp_path / str(place)) == []


@pytest.mark.unhooked
def test_fashion_in_seconds_and_without_crying_wolf() -> None:
    found = survey(open_data("sample:fashion"))
    assert found.looked_at == found.pictures == 12_000
    assert found.unreadable == ()
    # Trousers look like trousers: 18 pairs of 12,000 pictures, none equal byte for byte. A hash alone says 30,000.
    assert len(found.pairs) < 40
    assert not any(pair.exact for pair in found.pairs)
    assert found.seconds < 30  # 2.4 on two cores


def test_time_is_kept_and_what_was_looked_at_is_said(tmp_path: Path) -> None:
    root = folder(tmp_path, train={"a": scenes(0, 40, 16), "b": scenes(50, 40, 16)})
    began = time.monotonic()
    found = looked(root, seconds=0.0)
    assert time.monotonic() - began < 5
    assert found.looked_at < found.pictures == 80
    assert "of 80 pictures" in found.lines()[-1]
    assert "as training meets them" in found.lines()[-1]


@dataclass(frozen=True)
class Arrays:
    """A user's own source, of arrays, some with channels that are no colours."""

    classes: tuple[str, ...] = ("a", "b")
    fingerprint: str = "0"

    @property
    def labels(self) -> np.ndarray:
        return np.array([0, 1, -1])

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Sample:
        if index > 2:
            raise IndexError
        pixels = np.random.default_rng(index).random((8, 8, 6)).astype(np.float32)
        return Sample(f"array {index}", pixels, int(self.labels[index]))


def test_foreign_source_of_arrays() -> None:
    found = survey(Splits(Arrays(), None, None, "mine", False))
    assert (found.looked_at, found.unreadable, found.pairs) == (3, (), ())
    assert found.counts == {"train": {"a": 1, "b": 1}}
    assert sizes(Arrays()).tolist() == [-1] * 3


def test_large_photographs_are_looked_at_in_seconds(tmp_path: Path) -> None:
    # 12 megapixels each: decoded at an eighth, a picture takes 40 ms, in full 250.
    picture = scene(0, 256).resize((4000, 3000))
    for name in "ab":
        (tmp_path / name).mkdir()
        for number in range(5):
            picture.crop((number, 0, 3000 + number, 3000)).save(tmp_path / name / f"{number}.jpg", quality=85)
    began = time.monotonic()
    found = looked(tmp_path)
    assert found.looked_at == 10
    assert time.monotonic() - began < 10


def test_memory_source_is_read_in_threads_alike() -> None:
    splits = Splits(read_sample("fashion", "test"), None, None, "sample:fashion test", False)
    one, four = survey(splits, workers=1), survey(splits, workers=4)
    assert (one.pairs, one.unreadable, one.looked_at) == (four.pairs, four.unreadable, four.looked_at)
