"""Any known file becomes its model or one sentence; what was done to it stands in the report."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FIXTURES, TOKEN, agree, changed, recorded
from safetensors.torch import load_file, save_file

from vitrail import cli
from vitrail.commands import weights as command
from vitrail.core.errors import UserError
from vitrail.core.types import Numerics, Preprocess
from vitrail.core.values import from_json, to_json
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.resnet import ResNet, ResNetConfig
from vitrail.models.vit import ViT, ViTConfig
from vitrail.weights import labels, native, official
from vitrail.weights.formats import FAMILIES, identify, writer
from vitrail.weights.load import inspect, load, load_any, load_backbone
from vitrail.weights.report import LoadReport, page
from vitrail.weights.source import open_checkpoint, sha256

# What comes out


def test_load_gives_the_model_with_its_report() -> None:
    model = load(TOKEN)
    images, theirs = recorded("official_token")
    assert not model.training
    agree(model(images).detach(), theirs["logits"])
    report = model.report
    assert isinstance(report, LoadReport)
    assert report.format == "official"
    assert report.loaded == len(report.renamed) == len(np.load(TOKEN).files)
    assert dict(report.renamed)["cls"] == "backbone.prefix"
    assert report.numerics == Numerics("tanh", 1e-6, "zoom")
    assert report.preprocess == model.preprocess
    assert report.preprocess_source.startswith("assumed: ")
    assert (report.head, report.classes, report.labels, report.resampled) == ("usable", 11, 0, ())
    assert report.dtypes == ("float32",)
    assert report.sha256 == open_checkpoint(TOKEN).sha256()
    assert from_json(LoadReport, json.loads(json.dumps(to_json(report)))) == report
    page = str(report)
    for words in (str(TOKEN), report.sha256, "width 24, 3 blocks, 3 heads, MLP 48", "GELU tanh", "usable, 11 outputs"):
        assert words in page
    assert f"{sum(p.numel() for p in model.parameters()):,} parameters" in page


def test_a_digest_is_never_that_of_another_file(tmp_path: Path) -> None:
    shutil.copy(TOKEN, tmp_path / "a.npz")
    now, later = load(tmp_path / "a.npz"), load(tmp_path / "a.npz")
    expected = hashlib.sha256(TOKEN.read_bytes()).hexdigest()
    assert now.report.sha256 == expected
    (tmp_path / "b.npz").write_bytes(b"")
    (tmp_path / "b.npz").replace(tmp_path / "a.npz")
    assert now.report.sha256 == expected
    shutil.copy(TOKEN, tmp_path / "a.npz")
    os.utime(tmp_path / "a.npz", ns=(0, 5))
    sha256.cache_clear()
    assert later.report.sha256 == f"unknown: {tmp_path}/a.npz was changed after it was read"


def test_load_backbone_leaves_the_head_and_says_so() -> None:
    backbone = load_backbone(TOKEN)
    assert isinstance(backbone, ViT)
    assert not backbone.training
    images, _ = recorded("official_token")
    assert torch.equal(backbone.features(images).tokens, load(TOKEN).backbone.features(images).tokens)
    left = dict(backbone.report.left_out)
    assert set(left) == {"head/kernel", "head/bias"}
    assert backbone.report.loaded == len(np.load(TOKEN).files) - 2
    assert dict(backbone.report.renamed)["cls"] == "prefix"


def test_a_resnet_loads_too() -> None:
    backbone = load_backbone(FIXTURES / "bit.npz")
    assert isinstance(backbone, ResNet)
    assert "BiT-R" in backbone.report.architecture


@pytest.mark.parametrize("case", ["a head of zeros", "no head"])
def test_a_head_that_is_none_is_refused_and_the_backbone_is_taken(tmp_path: Path, case: str) -> None:
    zeros = case == "a head of zeros"
    entries = {
        "head/kernel": np.zeros((24, 11), np.float32) if zeros else None,
        "head/bias": np.zeros(11, np.float32) if zeros else None,
    }
    file = changed(tmp_path, **entries)
    with pytest.raises(
        UserError, match=f"has {case}.*so it cannot classify: load it with load_backbone, or finetune it"
    ):
        load(file)
    backbone = load_backbone(file)
    assert backbone.report.head == ("all zeros" if zeros else "absent")
    images, _ = recorded("official_token")
    assert torch.equal(backbone.features(images).prefix, load(TOKEN).backbone.features(images).prefix)
    assert inspect(file).head == backbone.report.head
    whole = load_any(file, image=(96, 96))
    assert isinstance(whole, Classifier) == zeros
    assert whole.preprocess.size == (96, 96)


def test_another_size_is_resampled_and_said() -> None:
    images, theirs = recorded("official_token_96")
    larger = load(TOKEN, image=(96, 96), dropout=0.25, drop_path=0.5)
    agree(larger(images).detach(), theirs["logits"])
    assert larger.config.backbone.image == larger.preprocess.size == larger.report.preprocess.size == (96, 96)
    assert (larger.config.backbone.dropout, larger.config.backbone.drop_path) == (0.25, 0.5)
    assert larger.report.resampled == ("position table from 8 x 8 to 12 x 12 by zoom",)
    assert "resampled     position table" in str(larger.report)
    assert load(TOKEN, image=(64, 64)).report.resampled == ()
    assert load_backbone(TOKEN, image=(64, 96)).report.resampled == ("position table from 8 x 8 to 8 x 12 by zoom",)


def test_the_preprocessing_can_be_given() -> None:
    mine = Preprocess((64, 64), 72, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    model = load(TOKEN, preprocess=mine)
    assert model.preprocess == model.report.preprocess == mine
    assert model.report.preprocess_source == "given by hand"
    assert "shorter side to 72, central crop 64 x 64, bicubic; mean 0.1 0.2 0.3, deviation 0.4 0.5 0.6" in str(
        model.report
    )
    with pytest.raises(UserError, match=r"gives 1 channels, but .* takes 3"):
        load(TOKEN, preprocess=Preprocess((64, 64), mean=(0.5,), deviation=(0.5,)))
    larger = load(TOKEN, preprocess=mine, image=(128, 128))
    assert larger.preprocess == larger.report.preprocess == replace(mine, size=(128, 128), resize=144)


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        ("", {}),
        ("imagenet", {"mean": (0.485, 0.456, 0.406), "deviation": (0.229, 0.224, 0.225)}),
        ("bicubic, resize=72 ,size=64x56", {"interpolation": "bicubic", "resize": 72, "size": (64, 56)}),
        ("size=56", {"size": (56, 56)}),
        ("resize=70x80,half", {"resize": (70, 80)}),
        ("resize=9,resize=none", {"resize": None}),
    ],
)
def test_the_preprocessing_can_be_said_in_words(words: str, changes: dict[str, Any]) -> None:
    assert load(TOKEN, preprocess=words).preprocess == replace(load(TOKEN).preprocess, **changes)


@pytest.mark.parametrize("words", ["cubic", "size=none", "resize=0", "size=", "mean=1", "imagenet bicubic"])
def test_words_for_no_preprocessing_are_one_sentence(words: str) -> None:
    with pytest.raises(UserError, match=r"^--preprocess .*: give [^\n]*$"):
        load(TOKEN, preprocess=words)


def test_half_precision_becomes_single_and_is_said() -> None:
    model = load(FIXTURES / "bigvision_scan_bf16.npz")
    images, theirs = recorded("bigvision_scan_bf16")
    agree(model(images).detach(), theirs["logits"])
    assert model.report.dtypes == ("bfloat16 -> float32",)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_our_own_files_keep_their_type(tmp_path: Path) -> None:
    native.save(load(TOKEN).bfloat16(), tmp_path)
    model = load(tmp_path)
    assert model.report.dtypes == ("bfloat16",)
    assert model.report.preprocess_source == "stated in the file"
    assert model.report.format == "vitrail"


def test_our_own_files_hold_a_resnet(tmp_path: Path) -> None:
    config = ResNetConfig((1, 1), root_width=32, image=(32, 32))
    model = ClassifierConfig(config, 3, "mean").build(seed=0).eval()
    native.save(model, tmp_path / "classifier")
    native.save(model.backbone, tmp_path / "backbone")
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load(tmp_path / "classifier")(images), model(images))
    for name in ("classifier", "backbone"):
        assert torch.equal(
            load_backbone(tmp_path / name).features(images).tokens, model.backbone.features(images).tokens
        )


# Names of classes


def wide(tmp_path: Path, classes: int) -> Path:
    """An official file with so many classes."""
    model = ClassifierConfig(ViTConfig(8, 1, 2, 8, (8, 8), (16, 16)), classes).build(seed=0)
    torch.nn.init.normal_(model.head.output.weight, generator=torch.Generator().manual_seed(0))
    official.write(model, tmp_path / "wide.npz")
    return tmp_path / "wide.npz"


def test_imagenet_heads_get_their_names_and_it_is_said(tmp_path: Path) -> None:
    model = load(wide(tmp_path, 1000))
    assert model.labels == labels.imagenet1k()
    assert model.report.labels == 1000
    assert any("taken to be ImageNet-1k's" in note for note in model.report.notes)
    assert load(wide(tmp_path, 21_843)).labels == labels.imagenet21k()
    for classes in (999, 21_841):
        model = load(wide(tmp_path, classes))
        assert model.labels == ()
        assert not [note for note in model.report.notes if "ImageNet" in note]


def test_the_lists_of_names() -> None:
    names, ids = labels.imagenet1k(), labels.imagenet1k_ids()
    assert len(names) == len(set(names)) == len(ids) == len(set(ids)) == 1000
    assert list(ids) == sorted(ids)
    assert names[0] == "tench, Tinca tinca"
    assert names[999] == "toilet tissue, toilet paper, bathroom tissue"
    # The classes of fast.ai's Imagenette, by their published ids.
    assert ids.index("n03000684") == 491
    assert names[491] == "chain saw, chainsaw"
    assert names[134] == "crane (n02012849)"
    assert names[517] == "crane (n03126707)"
    assert len(labels.imagenet21k()) == len(set(labels.imagenet21k())) == len(set(labels.imagenet21k_ids())) == 21_843
    assert labels.imagenet21k()[0] == "organism, being"
    # All but the teddy are in Google's 21,843.
    assert set(ids) - set(labels.imagenet21k_ids()) == {"n04399382"}


def test_the_reassessed_labels() -> None:
    real = labels.real()
    assert len(real) == 50_000
    # The paper's section 3: 46,837 pictures keep a label.
    assert sum(1 for right in real if right) == 46_837
    assert {label for right in real for label in right} == set(range(1000))
    assert real[:3] == ((), (970, 795), (230, 231))


# Refusals


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"cls": None}, "cls|class"),
        ({"Transformer/encoder_norm/bias": None}, "lacks the tensor Transformer/encoder_norm/bias"),
        (
            {"Transformer/encoderblock_1/LayerNorm_0/scale": np.ones(25, np.float32)},
            r"LayerNorm_0/scale of shape \(25,\)",
        ),
        ({"head/kernel": np.zeros((1, 24, 11), np.float32)}, r"head/kernel of shape \(1, 24, 11\)"),
        ({"embedding/kernel": np.zeros((1, 8, 8, 3, 24), np.float32)}, r"embedding/kernel of shape \(1, 8, 8, 3, 24\)"),
        ({"surprise": np.zeros(3, np.float32)}, "does not have, surprise"),
        ({"head/bias": np.full(11, np.nan, np.float32)}, "head/bias with 11 of 11 numbers NaN"),
        (
            {"Transformer/encoderblock_2/MlpBlock_3/Dense_0/kernel": np.zeros((24, 48, 1), np.float32)},
            r"Dense_0/kernel of shape \(24, 48, 1\)",
        ),
    ],
)
def test_a_file_that_does_not_fit_together_is_one_sentence_and_exit_code_2(
    tmp_path: Path,
    entries: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = changed(tmp_path, **entries)
    with pytest.raises(UserError, match=message) as raised:
        load(file)
    assert "\n" not in str(raised.value)
    monkeypatch.setitem(cli.VERBS, "weights", ("vitrail.commands.weights:run", "what a checkpoint is"))
    assert cli.main(["weights", str(file)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert "changed.npz" in said.err


def test_damaged_files_are_refused_by_every_way_in(tmp_path: Path) -> None:
    content = bytearray(TOKEN.read_bytes())
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.npz").write_bytes(content)
    (tmp_path / "cut.npz").write_bytes(content[: len(content) // 2])
    for name in ("flipped.npz", "cut.npz"):
        for way in (load, load_backbone, inspect):
            with pytest.raises(UserError, match="damaged"):
                way(tmp_path / name)


@pytest.mark.parametrize(
    ("key", "family"),
    [
        ("layers.0.blocks.0.attn.relative_position_bias_table", "a Swin Transformer"),
        ("swin.encoder.layers.0.blocks.0.attention.self.relative_position_bias_table", "a Swin Transformer"),
        ("blocks.0.mlp_tokens.fc1.weight", "an MLP-Mixer"),
        ("MixerBlock_0/token_mixing/Dense_0/kernel", "an MLP-Mixer"),
        ("blocks.0.attn.q_bias", "a BEiT"),
        ("beit.encoder.layer.0.attention.attention.relative_position_bias.relative_position_bias_table", "a BEiT"),
        ("blocks.0.attn.inner_attn_ln.weight", "an EVA"),
        ("stages.0.blocks.0.conv_dw.weight", "a ConvNeXt"),
        ("convnext.encoder.stages.0.layers.0.dwconv.weight", "a ConvNeXt"),
        ("layer1.0.conv1.weight", "a ResNet of torchvision's kind"),
        ("visual.transformer.resblocks.0.attn.in_proj_weight", "a CLIP in OpenAI's names"),
        ("transformer.text_model.encoder.layers.0.layer_norm1.weight", "a text tower"),
        ("model.layers.0.self_attn.q_proj.weight", "a language model"),
        ("to_patch_embedding.1.weight", "a ViT of lucidrains/vit-pytorch"),
        ("base.lora_A.weight", "a LoRA adapter"),
    ],
)
def test_known_families_are_named_and_refused(tmp_path: Path, key: str, family: str) -> None:
    assert any(family in known or known in family for known in FAMILIES.values())
    save_file({key: torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(
        UserError, match=rf"other\.safetensors is {family}.*which is not read \(its tensor {key}"
    ) as raised:
        load(tmp_path / "other.safetensors")
    assert "\n" not in str(raised.value)


def test_a_model_that_only_its_config_names_is_refused_by_that_name(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "pvt_v2"}')
    with pytest.raises(UserError, match=r"is a 'pvt_v2' model, which is not read .its config.json says so"):
        load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"holds no model that is known here \(first tensors: weight\)"):
        load(tmp_path)


def test_each_fixture_is_taken_for_what_it_is() -> None:
    for case, name in (
        ("official_token.npz", "official"),
        ("official_hybrid.npz", "official"),
        ("bigvision_map.npz", "big_vision"),
        ("bigvision_gap_sincos.npz", "big_vision"),
        ("bit.npz", "bit"),
        ("hf_vit", "huggingface"),
        ("timm_plain.safetensors", "timm"),
    ):
        assert name == identify(open_checkpoint(FIXTURES / case)).NAME
    with pytest.raises(UserError, match="--to jax is no format that can be written: give one of vitrail, official"):
        writer("jax")


# The command


def test_the_command_prints_the_report_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.run(command.Settings(str(TOKEN), keys=True)) == 0
    said = capsys.readouterr().out
    assert str(inspect(TOKEN)) in said
    assert "cls -> backbone.prefix" in said
    assert command.run(command.Settings(str(TOKEN), json=True)) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("sha256") == inspect(TOKEN).sha256
    assert from_json(LoadReport, found) == inspect(TOKEN)


def test_in_a_terminal_the_words_keep_their_column() -> None:
    lines = list(load(FIXTURES / "hf_vit").report.lines())
    narrow = page(lines, 80).splitlines()
    assert max(map(len, narrow)) <= 80
    assert len(narrow) > len(lines)
    assert all(line[13] == " " for line in narrow)
    assert "".join(page(lines, 80).split()) == "".join(page(lines).split())
    assert page([("", ""), ("sha256", "0" * 64)], 40).splitlines() == ["", f"{'sha256':<14}{'0' * 64}"]


def test_a_run_folder_whose_config_is_not_the_models_is_read(tmp_path: Path) -> None:
    """A run's config.json is the run's; one that is broken does not matter to the weights."""
    native.save(load(TOKEN), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{broken")
    assert isinstance(load(tmp_path), Classifier)
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "copy.safetensors")
    tensors = load_file(tmp_path / "copy.safetensors")
    assert set(tensors) == set(load(tmp_path).state_dict())
