"""Names reach their models; a checkpoint says all about itself, comes back to the bit, and fails in one sentence."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vitrail.commands import models
from vitrail.core.errors import UserError
from vitrail.core.types import Numerics, Preprocess
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNetConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights import native, zoo
from vitrail.weights.load import load, load_backbone

# Names


@pytest.mark.parametrize(
    ("name", "variant", "patch"),
    [
        ("ViT-B/16", "B", (16, 16)),
        ("ViT-B_16", "B", (16, 16)),
        ("vit-b16", "B", (16, 16)),
        ("VIT_b-16", "B", (16, 16)),
        ("B/16", "B", (16, 16)),
        ("ViT-B/16x8", "B", (16, 8)),
        ("vit-ti16", "Ti", (16, 16)),
        ("vit-g14", "g", (14, 14)),
        ("vit-G14", "G", (14, 14)),
        ("ViT-So400m/14", "So400m", (14, 14)),
        ("vit-so400m14", "So400m", (14, 14)),
        ("vit-nano4", "Nano", (4, 4)),
        ("ViT-E/14", "e", (14, 14)),
    ],
)
def test_every_spelling_reaches_its_entry(name: str, variant: str, patch: tuple[int, int]) -> None:
    assert zoo.parse(name) == (variant, patch)
    config = zoo.config(name)
    assert (config.width, config.depth, config.mlp, config.heads) == tuple(zoo.VARIANTS[variant])
    assert config.patch == patch


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ViT-X/16", "ViT-S/16"),
        ("vit-b", "ViT-B/8"),
        ("vit-b/1six", "ViT-B/16"),
        ("resnet50", "BiT-R50x"),
        ("", "ViT-"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UserError, match=f"no model named '{name}': the nearest is {nearest}"):
        zoo.config(name)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # the official code's models_test.py
        ("R+ViT-Ti/16", 6_337_704),
        ("R26+ViT-S_32", 36_431_912),
        ("r26+vit-b32", 101_383_976),
        ("R50+B/16", 98_659_112),
        ("R50+ViT-L/32", 328_994_856),
        # the released files
        ("BiT-R50x1", 25_549_352),
        ("bit_m_r101x3", 387_934_888),
        ("R152x4", 936_533_224),
    ],
)
def test_hybrids_and_resnets_have_names_and_published_parameter_counts(name: str, parameters: int) -> None:
    config = zoo.config(name)
    pool = "mean" if isinstance(config, ResNetConfig) else "class"
    assert ClassifierConfig(config, 1000, pool).parameters() == parameters


def test_a_resnet_is_created_by_name() -> None:
    model = zoo.create("BiT-R50x1", classes=3, image=(64, 64), root_width=32)
    assert model.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)
    assert model.config.pool == "mean"
    hybrid = zoo.config("R+ViT-Ti/16", (96, 64), class_token=False)
    assert isinstance(hybrid, ViTConfig)
    assert hybrid.grid == (3, 2)
    for wrong in ("R26+B/16", "R50+ViT-B/16x8", "R18x1"):
        with pytest.raises(UserError, match="there is no model named"):
            zoo.config(wrong)


def test_the_default_picture_is_about_224_pixels() -> None:
    assert zoo.config("ViT-B/16").image == (224, 224)
    assert zoo.config("ViT-B/15x32").image == (225, 224)
    assert zoo.config("ViT-B/16", (384, 512)).grid == (24, 32)
    assert all(min(zoo.config(name).image) in (217, 224) for name in zoo.NAMES)


def test_create_follows_what_it_is_told() -> None:
    model = zoo.create("ViT-Nano/4", labels=("a", "b"), image=(28, 32), channels=1, dropout=0.1)
    assert model.config.classes == 2
    assert model.labels == ("a", "b")
    assert model.preprocess == Preprocess((28, 32), mean=(0.5,), deviation=(0.5,))
    assert model.config.backbone.dropout == 0.1
    assert zoo.create("ViT-Nano/4", classes=2, image=(8, 8), pool="mean").config.backbone.class_token is False
    assert zoo.create("ViT-Nano/4", classes=2, image=(8, 8), class_token=False).config.pool == "mean"
    preprocess = Preprocess((20, 20), 24, "bicubic", (0.1,) * 4, (0.2,) * 4)
    model = zoo.create("ViT-Nano/4", classes=2, preprocess=preprocess)
    assert (model.preprocess, model.config.backbone.channels) == (preprocess, 4)
    assert model.config.backbone.image == (20, 20)
    with pytest.raises(UserError, match="number of classes or their labels"):
        zoo.create("ViT-Nano/4")
    with pytest.raises(UserError, match="20 x 20, but the model was asked for 4 of 24 x 24"):
        zoo.create("ViT-Nano/4", classes=2, preprocess=preprocess, image=(24, 24))


def test_the_table_of_models(capsys: pytest.CaptureFixture[str]) -> None:
    assert models.run(models.Settings(resolution=384, json=True)) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(zoo.NAMES)
    assert rows["ViT-B/16"]["tokens"] == 24 * 24 + 1
    assert rows["ViT-B/16"]["parameters"] == 85_798_656 + (24 * 24 - 14 * 14) * 768
    assert rows["ViT-H/14"]["resolution"] == 378
    assert models.run(models.Settings()) == 0
    table = capsys.readouterr().out
    assert "85,798,656" in table
    assert "17.56" in table
    with pytest.raises(UserError, match="--resolution"):
        models.run(models.Settings(resolution=0))


# Checkpoints


BACKBONE = ViTConfig(24, 2, 3, 40, (4, 4), (16, 16), 1, numerics=Numerics("erf", 1e-5, "bicubic"))


@pytest.fixture
def model() -> Classifier:
    built = ClassifierConfig(BACKBONE, 3, "attention", hidden=8, head_bias=-2.0).build(seed=1)
    torch.nn.init.normal_(built.head.output.weight, generator=torch.Generator().manual_seed(0))
    built.labels = ("cat", "dog", "ä")
    built.preprocess = Preprocess((16, 16), 20, "lanczos", (0.3,), (0.4,))
    return built.eval()


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("place", ["folder/inside", "folder/name.safetensors"])
def test_a_checkpoint_comes_back_to_the_bit(model: Classifier, tmp_path: Path, dtype: torch.dtype, place: str) -> None:
    model = model.to(dtype)
    file = native.save(model, tmp_path / place)
    before = torch.get_rng_state()
    back = load(tmp_path / place)
    assert torch.equal(torch.get_rng_state(), before)
    assert not back.training
    assert (back.config, back.preprocess, back.labels) == (model.config, model.preprocess, model.labels)
    ours, theirs = model.state_dict(), back.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and theirs[name].dtype == dtype for name in ours)
    assert torch.equal(model(images(2, 1, 16, 16)), back(images(2, 1, 16, 16)))
    beside = {path.name for path in file.parent.iterdir()}
    assert beside == ({file.name} if place.endswith("safetensors") else {"model.safetensors", "config.json"})
    back.train()(images(2, 1, 16, 16)).sum().backward()


def test_a_checkpoint_describes_itself_and_people_can_read_it(model: Classifier, tmp_path: Path) -> None:
    file = native.save(model, tmp_path)
    description = native.describe(tmp_path)
    assert description == native.describe(file)
    assert description.kind == "classifier"
    assert description.config == model.config
    assert description.backbone == BACKBONE
    assert description.labels == ("cat", "dog", "ä")
    copy = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert copy["labels"] == ["cat", "dog", "ä"]
    assert copy["config"]["backbone"]["numerics"]["gelu"] == "erf"
    assert copy["format"] == native.FORMAT
    (tmp_path / "plain").write_text("")
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_backbone_loads_from_its_own_file_and_from_a_classifiers(model: Classifier, tmp_path: Path) -> None:
    native.save(model, tmp_path / "classifier")
    native.save(model.backbone, tmp_path / "backbone")
    expected = model.backbone.features(images(2, 1, 16, 16)).tokens
    for name in ("classifier", "backbone"):
        backbone = load_backbone(tmp_path / name)
        assert backbone.preprocess == model.preprocess
        assert torch.equal(backbone.features(images(2, 1, 16, 16)).tokens, expected)
    with pytest.raises(UserError, match="has no head, so it cannot classify: load it with load_backbone"):
        load(tmp_path / "backbone")


def test_a_checkpoint_loads_at_another_size_with_other_chances(model: Classifier, tmp_path: Path) -> None:
    native.save(model, tmp_path)
    larger = load(tmp_path, image=(24, 32), dropout=0.25, drop_path=0.1)
    assert larger.config.backbone == replace(BACKBONE, image=(24, 32), dropout=0.25, drop_path=0.1)
    assert larger.preprocess == replace(model.preprocess, size=(24, 32), resize=30)
    assert larger.backbone.position_embedding.grid.shape == (6, 8, 24)
    torch.testing.assert_close(larger(images(2, 1, 24, 32)), model(images(2, 1, 24, 32)), rtol=1e-5, atol=1e-5)
    native.save(larger, tmp_path / "larger")
    assert load(tmp_path / "larger").preprocess.size == (24, 32)
    assert load_backbone(tmp_path, image=(24, 32)).config.grid == (6, 8)


def test_saving_replaces_whole_files_and_a_failure_leaves_the_old_one(model: Classifier, tmp_path: Path) -> None:
    file = native.save(model, tmp_path)
    old = file.read_bytes()
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(UserError, match=r"taken\.safetensors could not be written"):
        native.save(model, tmp_path / "taken.safetensors")
    with pytest.raises(UserError, match="cannot be made"):
        native.save(model, file / "below a file")
    assert file.read_bytes() == old
    (tmp_path / "model.safetensors.part").write_bytes(b"left by a kill")
    opened = file.open("rb")
    with torch.no_grad():
        model.head.output.bias.add_(1)
    native.save(model, tmp_path)
    # Whoever had the old file open still reads the old one.
    assert opened.read() == old
    opened.close()
    assert file.read_bytes() != old
    assert not (tmp_path / "model.safetensors.part").exists()


def test_a_runs_folder_is_not_saved_into(model: Classifier, tmp_path: Path) -> None:
    """Its config.json is what `train --resume` goes on from, its model.safetensors the run's best."""
    for place, config in (("foreign", '{"model_type": "vit"}'), ("damaged", '{"settings":'), ("words", '"settings"')):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").write_text(config)
        native.save(model, tmp_path / place)
        assert native.describe(tmp_path / place).kind == "classifier"
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"format": 1, "settings": {"model": "ViT-Ti/16"}}')
    before = (run / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"run is the folder of a training run, .*: give another folder, or a file"):
        native.save(model, run)
    assert [file.name for file in run.iterdir()] == ["config.json"]
    native.save(model, run / "other.safetensors")
    native.save(model, run / "exported")
    assert (run / "config.json").read_bytes() == before


def test_a_full_disk_is_one_sentence_and_the_old_checkpoint_stays(model: Classifier, tmp_path: Path) -> None:
    pytest.importorskip("resource")
    old = native.save(model, tmp_path).read_bytes()
    # A limit on the size of files stands for the full disk: the write fails half-way.
    code = (
        "import resource, signal, sys; from vitrail.core.errors import UserError; from vitrail.weights import native\n"
        "from vitrail.weights.load import load; model = load(sys.argv[1])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try: native.save(model, sys.argv[1])\n"
        "except UserError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(native.__file__).parents[2])}
    command = [sys.executable, "-c", code, str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout
    assert "model.safetensors could not be written" in said
    assert (tmp_path / "model.safetensors").read_bytes() == old
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "config.json"}


def damaged(file: Path, how: str) -> Path:
    content = file.read_bytes()
    metadata = json.loads(json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["vitrail"])
    tensors = load_file(file)
    match how:
        case "missing":
            return file.with_name("nothing.safetensors")
        case "a folder without one":
            return file.parent.parent
        case "empty":
            file.write_bytes(b"")
        case "cut in half":
            file.write_bytes(content[: len(content) // 2])
        case "cut in the header":
            file.write_bytes(content[:200])
        case "one byte short":
            file.write_bytes(content[:-1])
        case "a picture":
            file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(1000))
        case "a text":
            file.write_text("hello, this is no checkpoint at all")
        case "a damaged header":
            file.write_bytes(content[:100] + b"\xff" * 20 + content[120:])
        case "another project's":
            save_file(tensors, file, metadata={"format": "pt"})
        case "a newer format":
            save_file(tensors, file, metadata={"vitrail": json.dumps({"format": 99, "secret": 1})})
        case "an unknown setting":
            metadata["config"]["backbone"]["rope"] = True
            save_file(tensors, file, metadata={"vitrail": json.dumps(metadata)})
        case "a missing tensor":
            del tensors["backbone.encoder.norm.bias"]
            save_file(tensors, file, metadata={"vitrail": json.dumps(metadata)})
        case "an unknown tensor":
            tensors["backbone.extra"] = torch.zeros(2)
            save_file(tensors, file, metadata={"vitrail": json.dumps(metadata)})
        case "another shape":
            metadata["config"]["classes"] = 4
            metadata["labels"] = []
            save_file(tensors, file, metadata={"vitrail": json.dumps(metadata)})
    return file


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "there is no checkpoint .*nothing.safetensors: check the path"),
        ("a folder without one", "holds no checkpoint and no model.safetensors"),
        ("empty", "is empty"),
        ("cut in half", r"is cut short, at \d+ bytes: copy it again"),
        ("cut in the header", "is cut short, at 200 bytes"),
        ("one byte short", "is cut short"),
        ("a picture", "is no .npz, .safetensors or torch file"),
        ("a text", "is no .npz, .safetensors or torch file"),
        ("a damaged header", "has a damaged header"),
        ("another project's", "holds no model that is known here"),
        ("a newer format", "has checkpoint format 99, and this vitrail reads up to 1: update vitrail"),
        ("an unknown setting", "in a way that this vitrail does not know .*backbone"),
        ("a missing tensor", "lacks what becomes backbone.encoder.norm.bias"),
        ("an unknown tensor", "holds the unknown backbone.extra, against its own architecture"),
        ("another shape", r"head.output.weight of shape \(3, 8\), where its other tensors ask for \(4, 8\)"),
    ],
)
def test_each_damage_is_one_sentence(model: Classifier, tmp_path: Path, how: str, message: str) -> None:
    file = damaged(native.save(model, tmp_path / "in" / "model"), how)
    with pytest.raises(UserError, match=message) as raised:
        load(file)
    assert "\n" not in str(raised.value)
    if how != "another shape":
        with pytest.raises(UserError):
            load_backbone(file)
