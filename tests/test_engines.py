"""Engines agree with the model, are chosen by measurement, and remembered; in the pass without shape checks."""

import builtins
import functools
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from processes import Nursery

from vitrail.commands.reading import Checkpoint
from vitrail.core.errors import UserError
from vitrail.core.types import Preprocess
from vitrail.data.sources import read_sample, subset
from vitrail.inference.agreement import compare, sample_pictures
from vitrail.inference.choose import choose
from vitrail.inference.engines import Engine, Setup, build, engine
from vitrail.inference.features import extract, reader
from vitrail.inference.graphs import Asked, easy, filled, fillers, openvino_model
from vitrail.layers.merging import Merging
from vitrail.layers.resampling import _resampling_matrix
from vitrail.layers.resampling_formula import resampling_formula
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViT, ViTConfig
from vitrail.weights.native import save

SMALL = ViTConfig(width=24, depth=2, heads=3, mlp=40, patch=(4, 4), image=(16, 16))
unhooked = pytest.mark.unhooked


@pytest.fixture
def model() -> Classifier:
    made = ClassifierConfig(SMALL, 10).build()
    source = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=source))
    made.preprocess = Preprocess((16, 16), mean=(0.4, 0.5, 0.6), deviation=(0.2, 0.3, 0.25))
    return made  # in training mode, as it was made: engines must not mind


@unhooked
@pytest.mark.parametrize(
    ("name", "precision", "allowed"),
    [
        ("eager", "fp32", 1e-6),
        ("eager", "bf16", 0.03),
        ("openvino", "fp32", 1e-5),
        ("openvino", "bf16", 0.03),
        ("onnx", "fp32", 1e-5),
        ("compile", "fp32", 1e-5),
    ],
)
def test_engines_agree(
    name: Any, precision: Any, allowed: float, model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What Inductor makes of the model's graph, tests/test_models_compiled.py asks; it takes half a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    made = engine(model, name, precision, batch=4, threads=2, cache=tmp_path)
    assert isinstance(made, Engine)
    assert (made.name, made.precision) == (name, precision)
    assert model.training
    for count in (1, 4, 11):
        pixels = sample_pictures(model.preprocess, count)
        model.eval()
        with torch.no_grad():
            wanted = model(pixels)
        model.train()
        for images in (pixels, model.preprocess.normalize(pixels))[: 1 if name == "compile" else 2]:
            found = made(images)
            assert found.dtype == torch.float32
            assert (found - wanted).abs().max() <= allowed * wanted.abs().max()
    if name != "compile":
        assert made(torch.zeros(2, 3, 20, 12, dtype=torch.uint8)).shape == (2, 10)


@unhooked
@pytest.mark.parametrize(
    ("rows", "wanted"), [(197, 198), (198, 198), (199, 200), (257, 258), (577, 578), (50, 50), (5, 16)]
)
def test_easy_numbers_have_a_divisor_that_is_a_block(rows: int, wanted: int) -> None:
    assert easy(rows) == wanted


def odd(**changes: Any) -> ViT:
    """Of 67 tokens, which is a prime."""
    made = replace(SMALL, image=(24, 44), patch=(4, 4), **changes).build(seed=3).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return made


def test_tokens_that_fill_up_change_nothing() -> None:
    model, images = odd(), torch.randn(2, 3, 24, 44, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, short = model.features(images, keep=(0, 1)), model.prefix_features(images)
        with filled(Asked(model, "class"), 3):
            found, shorter = model.features(images, keep=(0, 1)), model.prefix_features(images)
        assert model.encoder.fillers == 0
    for one, other in ((wanted, found), (short, shorter), *zip(wanted.layers, found.layers, strict=True)):
        torch.testing.assert_close(one.tokens, other.tokens, rtol=0, atol=1e-5)
        torch.testing.assert_close(one.prefix, other.prefix, rtol=0, atol=1e-5)


@unhooked
@pytest.mark.parametrize("reading", ["class", "mean"])
def test_openvino_is_given_an_easy_number_of_tokens(reading: Any) -> None:
    whole = Asked(odd(), reading)
    assert fillers(whole, (24, 44)) == 1
    graph = openvino_model(whole, (24, 44), alone=True)
    shapes = [
        output.partial_shape
        for node in graph.get_ops()
        for output in node.outputs()
        if not output.partial_shape.rank.is_dynamic
    ]
    assert any(len(shape) == 3 and shape[1] == 68 for shape in shapes)
    pixels = torch.randint(0, 256, (3, 3, 24, 44), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    made = build(whole, Setup("openvino"), batch=1, size=None, device="cpu", threads=1)
    with torch.no_grad():
        torch.testing.assert_close(made(pixels), whole(pixels), rtol=0, atol=1e-5)


def test_a_model_that_cannot_be_filled_up_is_not() -> None:
    assert fillers(Asked(odd(positions="rotary"), "mean"), (24, 44)) == 0
    merging = odd()
    merging.merge = 2
    assert fillers(Asked(merging, "mean"), (24, 44)) == 0
    assert fillers(Asked(odd(), "mean"), (16, 16)) == 0  # 17 tokens


@unhooked
def test_auto_measures_once_and_remembers(model: Classifier, tmp_path: Path) -> None:
    first = choose(model, "bf16", batch=4, threads=2, cache=tmp_path)
    assert not first.remembered
    assert first.speeds[first.setup.said] == max(first.speeds.values())
    assert len(first.speeds) >= 2
    assert first.setup.said in first.said
    again = choose(model, "bf16", batch=4, threads=2, cache=tmp_path)
    assert again.remembered
    assert (again.setup, again.speeds) == (first.setup, first.speeds)
    assert not choose(model, "bf16", batch=5, threads=2, cache=tmp_path).remembered
    for file in (tmp_path / "choices").iterdir():
        file.write_text("{")
    assert not choose(model, "bf16", batch=4, threads=2, cache=tmp_path).remembered


@unhooked
def test_a_wrong_engine_is_seen(model: Classifier, tmp_path: Path) -> None:
    whole = Asked(model)
    pixels = sample_pictures(model.preprocess, 2)
    right = build(whole, Setup("openvino", "fp32"), batch=2, size=None, device="cpu", threads=1, cache=tmp_path)
    assert compare(whole, right, pixels, "fp32").passed
    with torch.no_grad():
        model.head.output.weight.mul_(1.01)
    assert not compare(whole, right, pixels, "fp32").passed
    assert not compare(whole, lambda images: right(images) * torch.nan, pixels, "fp32").passed


@unhooked
def test_a_model_of_other_weights_is_not_taken_from_the_cache(model: Classifier, tmp_path: Path) -> None:
    engine(model, "openvino", cache=tmp_path)
    with torch.no_grad():
        model.head.output.weight.mul_(2)
    again = engine(model, "openvino", cache=tmp_path)
    assert compare(Asked(model), again, sample_pictures(model.preprocess, 2), "fp32").passed
    for file in tmp_path.glob("*/model.*"):
        file.write_bytes(b"damaged")
    again = engine(model, "openvino", cache=tmp_path)
    assert compare(Asked(model), again, sample_pictures(model.preprocess, 2), "fp32").passed


@unhooked
def test_a_missing_package_is_no_candidate_and_a_sentence(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("openvino", "onnxruntime")]:
        monkeypatch.delitem(sys.modules, name)
    there, find = builtins.__import__, importlib.util.find_spec

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name.split(".")[0] in ("openvino", "onnxruntime"):
            raise ModuleNotFoundError(name)
        return there(name, *rest, **more)

    gone = ("openvino", "onnxruntime")
    monkeypatch.setattr(importlib, "import_module", lambda name, *rest: missing(name, *rest))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in gone else find(name, *rest))
    for name, package in (("openvino", "openvino"), ("onnx", "onnxruntime")):
        with pytest.raises(UserError, match=rf'{name} needs the package {package}: pip install "vitrail\[export\]"'):
            engine(model, name, cache=tmp_path)  # type: ignore[arg-type]
    from vitrail.inference.choose import candidates

    names = [setup.name for setup in candidates("fp32", 4, 2, torch.device("cpu"))]
    assert names == ["eager"]


@pytest.mark.parametrize(
    ("name", "precision", "words"),
    [
        ("onnx", "bf16", "--engine onnx has no bf16"),
        ("eager", "int8", "--engine eager has no int8"),
        ("openvino", "int8", "--calibrate"),
        ("tensorrt", "fp32", "--engine tensorrt is not known"),
    ],
)
def test_what_an_engine_has_not(name: Any, precision: Any, words: str, model: Classifier) -> None:
    with pytest.raises(UserError, match=words):
        build(Asked(model), Setup(name, precision), batch=1, size=None, device="cpu", threads=1)


@unhooked
def test_features_by_an_engine_have_their_own_place_in_the_cache(model: Classifier, tmp_path: Path) -> None:
    source = subset(read_sample("fashion", "test"), range(6))
    whole = Asked(model, "class-mean", model.preprocess)
    fast = engine(whole, "openvino", "bf16", batch=6, cache=tmp_path / "engines")
    settings: dict[str, Any] = {"reading": "class-mean", "workers": 0, "cache": tmp_path / "features"}
    exact = extract(model, source, model.preprocess, **settings)
    rough = extract(model, source, model.preprocess, **settings, of=fast, mark="openvino bf16")
    assert len(list((tmp_path / "features").iterdir())) == 2
    assert not rough.features.equal(exact.features)
    torch.testing.assert_close(rough.features, exact.features, rtol=0.05, atol=0.1)
    model.backbone.merge = 2
    merged = extract(model, source, model.preprocess, **settings)
    model.eval()
    with torch.no_grad():
        wanted = reader(model, "class-mean")(sample_pictures(model.preprocess, 1))
    assert wanted.shape[1] == merged.features.shape[1]
    assert not merged.features.equal(exact.features)


@unhooked
def test_the_flags(model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    assert Checkpoint().asking(model, batch=4) is None
    assert Checkpoint(precision="bf16").asking(model, batch=4) is None
    assert Checkpoint(engine="auto").asking(model, batch=4, pictures=3) is None
    chosen = Checkpoint(engine="auto").asking(model, batch=4, pictures=1000)
    assert chosen is not None
    assert "Engine: " in capsys.readouterr().err
    for asked, words in (
        (Checkpoint(precision="int8"), "--engine eager has no int8"),
        (Checkpoint(engine="auto", precision="int8"), "--calibrate"),
    ):
        with pytest.raises(UserError, match=words):
            asked.asking(model, batch=4)
    with pytest.raises(UserError, match="features are none"):
        Checkpoint(engine="auto", precision="int8", calibrate="x").asking(model.backbone, batch=4)
    with pytest.raises(UserError, match="vtab runs eagerly"):
        Checkpoint(engine="auto").eager("vtab")
    save(model, tmp_path / "w.safetensors")
    assert Checkpoint(merge="2").classifier(tmp_path / "w.safetensors").backbone.merge == Merging(2)


@unhooked
def test_int8_is_calibrated_gated_and_falls_back(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("VITRAIL_CACHE", str(tmp_path / "cache"))
    draw = np.random.default_rng(0)
    (tmp_path / "mine").mkdir()
    for number in range(24):
        Image.fromarray(draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(tmp_path / "mine" / f"{number}.png")
    flags: dict[str, Any] = {"engine": "openvino", "precision": "int8", "calibrate": str(tmp_path / "mine")}
    made = Checkpoint(**flags, int8_drop=100.0).asking(model, batch=4)
    assert made is not None
    assert made.precision == "int8"
    assert "12 held-out pictures" in capsys.readouterr().err
    pixels = sample_pictures(model.preprocess, 4)
    assert compare(Asked(model), made, pixels, "int8").passed
    fallen = Checkpoint(**flags, int8_drop=-1.0).asking(model, batch=4)
    assert fallen is not None
    assert fallen.precision == "bf16"
    assert "so int8 is not used. bf16 is used in its place." in capsys.readouterr().err


@unhooked
def test_evaluate_and_probe_by_an_engine(model: Classifier, tmp_path: Path) -> None:
    model.labels = tuple("abcdefghij")
    save(model, tmp_path / "w.safetensors")
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in "ab":
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(6):
                pixels = draw.integers(0, 256, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / split / name / f"{number}.png")
    processes = Nursery(tmp_path)
    cached = f"import os; os.environ['VITRAIL_CACHE'] = {str(tmp_path / 'cache')!r}"

    def ask(verb: str, *flags: str) -> dict[str, Any]:
        command = [verb, "w.safetensors", "--workers", "0", "--json", "--data", "data", *flags]
        code, said, error = processes.run(*command, first=cached)
        assert code == 0, error
        return json.loads(said)

    answers = [ask("evaluate"), ask("evaluate", "--engine", "openvino")]
    assert [answer["engine"] for answer in answers] == ["eager", "openvino"]
    for row, other in zip(answers[0]["rows"], answers[1]["rows"], strict=True):
        assert row["value"] == pytest.approx(other["value"], rel=1e-4)
    probed = ask("probe", "--shots", "1", "--seeds", "1", "--engine", "openvino", "--precision", "bf16")
    assert (probed["engine"], probed["precision"]) == ("openvino", "bf16")


@pytest.mark.parametrize(
    "rule", ["zoom", "bilinear", "bicubic", "bicubic-antialias", "bicubic-aligned", "bicubic-offset"]
)
def test_the_formula_is_pytorchs_resampling(rule: Any) -> None:
    for old, new in ((14, 24), (14, 7), (14, 1), (5, 13), (1, 4), (24, 5)):
        wanted = _resampling_matrix(old, new, rule, torch.device("cpu"))
        torch.testing.assert_close(resampling_formula(old, new, rule), wanted, rtol=0, atol=1e-5)
    assert resampling_formula(7, 7, rule).equal(torch.eye(7))


def test_nothing_is_sent() -> None:
    code = (
        "import sys; from vitrail.inference.graphs import import_openvino; import_openvino(); import nncf; "
        "print([name for name, module in sys.modules.items() if name.startswith('openvino_telemetry') and module])"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )


SIGNALLED = """
import gc, os, signal, sys
import torch, vitrail
model = vitrail.create("ViT-Ti/16", classes=3, image=(32, 32)).eval()
images = torch.zeros(2, 3, 32, 32)
first, second = (vitrail.engine(model, "openvino", precision, batch=2) for precision in ("fp32", "bf16"))
first(images), second(images)
del first
gc.collect()
del second
gc.collect()
signal.signal(signal.SIGINT, lambda *given: print("asked to stop"))
os.kill(os.getpid(), signal.SIGINT)
"""


def test_a_signal_is_met_after_engines_have_gone(tmp_path: Path) -> None:
    environment = {**os.environ, "VITRAIL_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout) == (0, "asked to stop\n"), done.stderr
