"""What a person can get wrong, through the command: one sentence that names the file or the flag, and nothing lost."""

import json
import os
import re
import shlex
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import folder, picture
from processes import Nursery
from safetensors.torch import load_file, save_file

import vitrail
from vitrail.cli import main

SMALL = shlex.split("--model ViT-Nano/8 --size 16 --steps 4 --batch 8 --workers 0")
Say = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Nursery:
    return Nursery(tmp_path_factory.mktemp("processes"))


def refused(capsys: Say, *arguments: object) -> str:
    """The sentence of a command that ends with exit code 2: it alone stands on standard error."""
    assert main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "Traceback" not in error
    return error


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(path: Path) -> None:
    """A PNG of some hundred bytes that says it is 60,000 x 60,000 pixels."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)


def truncated(path: Path) -> None:
    picture(np.random.default_rng(0), 0, 60).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:600])


def forbidden(path: Path) -> None:
    picture(np.random.default_rng(0), 0).save(path, "PNG")
    path.chmod(0)


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty.jpg": (lambda path: path.write_bytes(b""), "empty"),
    "text.jpg": (lambda path: path.write_text("Dear diary,\n" * 9), "no picture of a format known here"),
    "truncated.jpg": (truncated, "truncated"),
    "bomb.png": (bomb, "decompression bomb"),
    "dangling.png": (lambda path: path.symlink_to("nowhere"), "No such file"),
    "forbidden.png": (forbidden, "Permission denied"),
}


# The data.


def test_a_missing_folder(capsys: Say) -> None:
    assert refused(capsys, "train", "--data", "nowhere", *SMALL).startswith("nowhere does not exist")


def test_no_data_at_all(capsys: Say) -> None:
    assert refused(capsys, "train", *SMALL).startswith("--data is missing")


def test_an_empty_folder(here: Path, capsys: Say) -> None:
    (here / "data").mkdir()
    assert refused(capsys, "train", "--data", "data", *SMALL).startswith("data holds no pictures")


def test_one_class(here: Path, capsys: Say) -> None:
    folder(here / "data", classes=1)
    assert "only one class (class0)" in refused(capsys, "train", "--data", "data", *SMALL)


def test_a_class_with_one_picture(here: Path, capsys: Say) -> None:
    folder(here / "data", each=10)
    for number in range(1, 10):
        (here / "data" / "class2" / f"{number}.png").unlink()
    assert main(["train", "--data", "data", *SMALL, "--out", "run"]) == 0
    said = capsys.readouterr().out
    assert "The class 'class2' has one picture: it stays in training" in said
    assert json.loads((here / "run" / "config.json").read_text())["data"]["counts"] == {"train": 19, "validation": 2}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission(here: Path, capsys: Say) -> None:
    folder(here / "data")
    (here / "data" / "class1").chmod(0)
    try:
        assert "class1 cannot be read (Permission denied)" in refused(capsys, "train", "--data", "data", *SMALL)
    finally:
        (here / "data" / "class1").chmod(0o700)


@pytest.mark.parametrize("name", UNREADABLE)
def test_too_many_unreadable_pictures_end_the_run_at_the_start(name: str, here: Path, capsys: Say) -> None:
    if name == "forbidden.png" and os.geteuid() == 0:
        pytest.skip("root may read everything")
    make, found = UNREADABLE[name]
    folder(here / "data", each=5)
    make(here / "data" / "class1" / name)
    assert main(["train", "--data", "data", *SMALL, "--out", "run"]) == 2
    first, *reasons = capsys.readouterr().err.splitlines()
    assert first.startswith("1 of 16 pictures (6.2%) cannot be read, more than 5%")
    assert len(reasons) == 1
    assert f"class1/{name}" in reasons[0]
    assert found in reasons[0]
    assert not (here / "run" / "config.json").exists()


def test_data_that_were_mended_as_told_are_taken(here: Path, capsys: Say) -> None:
    folder(here / "data", each=5)
    bad = here / "data" / "class1" / "empty.jpg"
    for out, place in ((["--out", "run"], "run"), ([], "runs/data-vit-nano-8")):
        bad.write_bytes(b"")
        assert main(["train", "--data", "data", *SMALL, *out]) == 2
        assert "cannot be read, more than 5%" in capsys.readouterr().err
        bad.unlink()
        assert main(["train", "--data", "data", *SMALL, *out]) == 0, capsys.readouterr().err
        assert json.loads((here / place / "split.json").read_text())["classes"]["class1"] == 5


@pytest.fixture
def few_bad(here: Path) -> Path:
    """120 good pictures, some of a wrong suffix, and five or six that cannot be read."""
    data = folder(here / "data", each=40)
    for name, (make, _) in UNREADABLE.items():
        if name != "forbidden.png" or os.geteuid() != 0:
            make(data / "class1" / name)
    for number in range(5):
        (data / "class0" / f"{number}.png").rename(data / "class0" / f"{number}.jpg")
    (data / "class0" / "folder.jpg").mkdir()
    return data


def test_few_unreadable_pictures_are_left_out_named_once_and_counted(few_bad: Path, here: Path, capsys: Say) -> None:
    assert main(["train", "--data", "data", *SMALL, "--out", "run"]) == 0
    said = "".join(capsys.readouterr())
    bad = [name for name in UNREADABLE if name != "forbidden.png" or os.geteuid() != 0]
    for name in bad:
        assert said.count(f"class1/{name}") == 1, name
    assert f"left out: {len(bad)} pictures" in said
    assert "Traceback" not in said
    results = json.loads((here / "run" / "results.json").read_text())
    assert sorted(Path(entry["name"]).name for entry in results["unreadable"]) == sorted(bad)
    config = json.loads((here / "run" / "config.json").read_text())
    assert sum(config["data"]["counts"].values()) == 120
    assert results["rows"][0]["count"] == config["data"]["counts"]["validation"]


def test_strict_ends_at_the_first(few_bad: Path, here: Path, capsys: Say) -> None:
    error = refused(capsys, "train", "--data", "data", *SMALL, "--strict", "--out", "run")
    assert error.startswith("--strict: data/class1/")
    assert not (here / "run" / "config.json").exists()


# The flags.


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--model ViT-Nano/8 --size 20", "20"),
        ("--model ViT-Nano/8 --size 16 16 16", "--size has 3 numbers"),
        ("--model ViT-Nino/8", "'ViT-Nino/8': the nearest is"),
        ("--batch -3", "--batch is -3; give a number from 0 up"),
        ("--log-every 0", "--log-every is 0; give a number from 1 up"),
        ("--dropout 1.5", "--dropout is 1.5; give a number from 0 to 1"),
        ("--epochs inf", "--epochs is inf; give a number from 0 up"),
        ("--evaluate-every 0", "--evaluate-every is 0"),
        ("--accumulate 0", "--accumulate is 0"),
        ("--seed -1", "--seed is -1"),
        ("--validation 1", "--validation is 1"),
        ("--device potato", "--device potato"),
        ("--rte 0.1", "--rte is not a flag of vitrail train; the nearest is --rate"),
        ("--rate fast", "--rate"),
        ("--config nowhere.toml", "--config nowhere.toml cannot be read"),
    ],
)
def test_flags_that_cannot_be(flags: str, said: str, here: Path, capsys: Say) -> None:
    folder(here / "data", each=5)
    error = refused(capsys, "train", "--data", "data", "--steps", 2, *flags.split())
    assert said in error


def test_a_folder_that_holds_a_run_is_not_overwritten(here: Path, capsys: Say) -> None:
    folder(here / "data", each=5)
    (here / "run").mkdir()
    (here / "run" / "config.json").write_text("{}")
    assert "--out run already holds a run" in refused(capsys, "train", "--data", "data", *SMALL, "--out", "run")
    assert (here / "run" / "config.json").read_text() == "{}"


def test_a_run_folder_that_cannot_be(here: Path, capsys: Say) -> None:
    folder(here / "data", each=5)
    (here / "file").write_text("")
    for place in ("file", "file/run"):
        assert f"--out {place} cannot be used" in refused(capsys, "train", "--data", "data", *SMALL, "--out", place)


def test_each_model_has_a_run_folder_of_its_own(here: Path, capsys: Say) -> None:
    folder(here / "data", each=5)
    small = shlex.split("--size 16 --steps 2 --batch 8 --workers 0")
    for model in ("ViT-Nano/8", "ViT-Nano/4", "ViT-Nano/8"):
        assert main(["train", "--data", f"{here}/data", "--model", model, *small]) == 0, capsys.readouterr().err
    places = ["data-vit-nano-4", "data-vit-nano-8", "data-vit-nano-8-2"]
    assert sorted(path.name for path in (here / "runs").iterdir()) == places
    capsys.readouterr()
    for model, place in (("ViT-Nano/4", places[0]), ("ViT-Nano/8", places[2])):
        assert main(["train", "--data", f"{here}/data", "--model", model, *small, "--resume"]) == 0
        assert f"run folder: runs/{place} " in capsys.readouterr().out


def test_a_class_whose_name_is_no_utf8(here: Path, capsys: Say) -> None:
    data = folder(here / "data", classes=2, each=5)
    (data / "class1").rename(os.fsdecode(os.fsencode(data) + b"/caf\xe9"))
    assert main(["train", "--data", "data", *SMALL, "--out", "run"]) == 0
    assert json.loads((here / "run" / "config.json").read_text())["data"]["classes"] == ["caf\\xe9", "class0"]
    assert main(["evaluate", "run", "--data", "data", "--workers", "0"]) == 0
    assert "caf\\xe9" in capsys.readouterr().out


# The checkpoint.


@pytest.fixture
def checkpoint(here: Path) -> Path:
    model = vitrail.create("ViT-Nano/8", labels=("class0", "class1", "class2"), image=(16, 16))
    return vitrail.save(model, here / "model.safetensors")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def newer(path: Path) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    described = json.loads(header["__metadata__"]["vitrail"])
    header["__metadata__"]["vitrail"] = json.dumps({**described, "format": 99})
    save_file(load_file(path), path, metadata=header["__metadata__"])


@pytest.mark.parametrize("verb", ["predict", "evaluate", "finetune"])
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut, "is cut short"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: path.write_text("weights"), "is no "),
        (foreign, "give "),
        (newer, "has checkpoint format 99"),
        (Path.unlink, "there is no checkpoint"),
    ],
)
def test_a_spoilt_checkpoint(
    verb: str, spoil: Callable[[Path], object], said: str, checkpoint: Path, here: Path, capsys: Say
) -> None:
    folder(here / "data", each=5)
    spoil(checkpoint)
    arguments = {
        "predict": [checkpoint, "data"],
        "evaluate": [checkpoint, "--data", "data", "--workers", 0],
        "finetune": ["--data", "data", "--weights", checkpoint, "--steps", 2, "--out", "run"],
    }[verb]
    error = refused(capsys, verb, *arguments)
    assert said in error
    assert "model.safetensors" in error


@pytest.mark.parametrize(("flag", "value"), [("--model", "ViT-B/16"), ("--positions", "learned")])
def test_weights_with_another_model(flag: str, value: str, checkpoint: Path, here: Path, capsys: Say) -> None:
    folder(here / "data", each=5)
    given = ["finetune", "--data", "data", "--weights", checkpoint, "--steps", 2, "--out", "run", flag, value]
    assert refused(capsys, *given).startswith(f"{flag} {value} is for random weights, and --weights {checkpoint} has")
    assert not (here / "run").exists()


def test_classes_that_the_checkpoint_does_not_know(checkpoint: Path, here: Path, capsys: Say) -> None:
    folder(here / "data", classes=4, each=3)
    error = refused(capsys, "evaluate", checkpoint, "--data", "data", "--workers", 0)
    assert "data has classes that the checkpoint does not know (class3)" in error


def test_unreadable_pictures_do_not_keep_the_others_from_being_predicted(
    checkpoint: Path, here: Path, capsys: Say
) -> None:
    folder(here / "data", each=2)
    (here / "data" / "class1" / "bad.png").write_bytes(b"no picture")
    assert main(["predict", str(checkpoint), "data", "--json"]) == 2
    out, error = capsys.readouterr()
    assert len([entry for entry in json.loads(out) if "predictions" in entry]) == 6
    assert error.count("class1/bad.png") == 1
    assert "Traceback" not in error


# The run itself.


RECIPE = """
import os, signal
from dataclasses import dataclass
import numpy as np
from vitrail.core.types import Sample
from vitrail.data.splits import Splits
from vitrail.experiments.recipe import Own, Recipe

PARENT = os.getpid()

@dataclass(frozen=True)
class Pixels:
    count: int
    classes: tuple[str, ...] = ("dark", "bright")
    fingerprint: str = "0"

    @property
    def labels(self):
        return np.arange(self.count) % 2

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        pixels = np.random.default_rng(index).uniform(0.5 * (index % 2), 0.5 + 0.5 * (index % 2), (16, 16, 3))
        {spoil}
        return Sample(f"number {{index}}", pixels.astype(np.float32), index % 2)

recipe = Recipe(own=Own(splits=Splits(Pixels(60), Pixels(20), None, "numbers", False)))
"""


def recipe(place: Path, spoil: str = "pass") -> Path:
    path = place / "recipe.py"
    path.write_text(RECIPE.format(spoil=spoil))
    return path


@pytest.fixture
def no_modules_left() -> Iterator[None]:
    path = list(sys.path)
    yield
    sys.path[:] = path
    sys.modules.pop("recipe", None)


@pytest.mark.usefixtures("no_modules_left")
@pytest.mark.parametrize("spoil", ["np.nan", "np.inf", "1e30"])
def test_pixels_that_are_no_numbers(spoil: str, here: Path, capsys: Say) -> None:
    file = recipe(here, f"pixels[3, 4] = {spoil} if index == 7 and self.count == 60 else 0.5")
    assert main(["run", str(file), *SMALL, "--out", "run"]) == 0
    said = "".join(capsys.readouterr())
    assert said.count("number 7 holds floating pixels") == 1
    assert "Traceback" not in said
    results = json.loads((here / "run" / "results.json").read_text())
    assert [entry["name"] for entry in results["unreadable"]] == ["number 7"]
    assert results["rows"][0]["count"] == 20
    assert all(value.isfinite().all() for value in load_file(here / "run" / "model.safetensors").values())


def test_a_rate_that_makes_the_loss_infinite(here: Path, capsys: Say) -> None:
    folder(here / "data", each=10)
    flags = ["--rate", "1e25", "--clip", "0", "--warmup", "2", "--save-minutes", "0", "--log-every", "1"]
    assert main(["train", "--data", "data", *SMALL, "--steps", "20", *flags, "--out", "run"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.splitlines()[-1]
    found = re.fullmatch(r"The loss was not finite at step (\d+) of 20; its batch is in run/divergence\.pt, .*\.", last)
    assert found, last
    assert torch.load(here / "run" / "divergence.pt", weights_only=True)["step"] == int(found[1])
    state = torch.load(here / "run" / "state.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["model"].values())
    # The same again, once more from that state: it is refused for what it is.
    assert main(["train", "--data", "data", "--out", "run", "--resume"]) == 2
    assert f"The loss was not finite at step {found[1]} of 20" in capsys.readouterr().err


def test_a_dead_data_worker(processes: Nursery) -> None:
    spoil = "os.getpid() != PARENT and index == 30 and os.kill(os.getpid(), signal.SIGKILL)"
    file = recipe(processes.folder, spoil)
    flags = [*SMALL, "--steps", 40, "--workers", 2, "--crop", "inception", "--log-every", 1]
    code, _, error = processes.run("run", file, *flags, "--out", "dead")
    assert code == 2
    assert error.splitlines()[-1].startswith("A data worker died (")
    assert "Traceback" not in error
    # Once it no longer dies, the run goes on.
    recipe(processes.folder)
    code, _, error = processes.run("run", file, *flags, "--out", "dead", "--resume")
    assert code == 0, error


PEAK = """
import atexit, re
def tell():
    said = open("/proc/self/status").read()
    open("peak", "w").write(re.search(r"VmPeak:\\s+(\\d+) kB", said)[1])
atexit.register(tell)
"""
"""Python for a child: writes the most address space that it ever had."""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and other systems do not keep to the limit")
def test_too_little_memory_names_what_fits(processes: Nursery) -> None:
    folder(processes.folder / "data", each=18)
    flags = [
        *shlex.split("train --data data --model ViT-Nano/2 --size 32 --steps 1 --workers 0 --precision fp32"),
        "--batch",
    ]
    code, _, error = processes.run(*flags, 1, "--out", "one", first=PEAK)
    assert code == 0, error
    # 48 pictures of 256 tokens need about 450 MiB more than one.
    limit = 1024 * int((processes.folder / "peak").read_text()) + (160 << 20)
    code, _, error = processes.run(*flags, 48, "--out", "large", memory=limit)
    assert code == 2, error
    assert "Traceback" not in error
    said = error.splitlines()[-1]
    found = re.fullmatch(
        r"A batch of 48 pictures does not fit into cpu memory; (\d+) at a time do: add --accumulate (\d+) "
        r"\(the same numbers, but for what is drawn at random\) or give --batch (\d+); a run that has begun needs another "
        r"--out for that\.",
        said,
    )
    assert found, error
    assert int(found[1]) == int(found[3]) == -(-48 // int(found[2]))
    # A little more than what was tried, for address space is lost to gaps between the tensors.
    code, _, error = processes.run(*flags, 48, "--accumulate", found[2], "--out", "parts", memory=limit + (48 << 20))
    assert code == 0, error
