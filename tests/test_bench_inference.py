"""vitrail bench inference: engines and peers in one alternating run."""

import json
from pathlib import Path

import pytest

from vitrail.benchmark import alone, inference
from vitrail.cli import main
from vitrail.core.errors import UserError


def test_the_sides_begin_with_the_reference():
    given = {"compiled": False, "device": "cpu"}
    names = inference.names(("auto", "eager", "onnx"), ("fp32", "bf16", "int8"), ("timm",), **given)
    assert names[0] == "timm eager fp32"
    assert "vitrail auto int8" in names
    assert "vitrail eager int8" not in names
    assert "vitrail onnx bf16" not in names
    assert {"openvino by-hand bf16", "openvino by-hand int8", "timm autocast bf16"} <= set(names)
    assert inference.names(("eager",), ("fp32",), (), **given) == ["vitrail eager fp32"]
    on_gpu = inference.names(("auto", "openvino"), ("bf16",), (), compiled=False, device="cuda")
    assert on_gpu == ["vitrail auto bf16"]
    with pytest.raises(UserError, match="--engines tensorrt"):
        inference.names(("tensorrt",), ("fp32",), (), **given)
    with pytest.raises(UserError, match="none of --engines onnx has --precision bf16; give another"):
        inference.names(("onnx",), ("bf16",), ("timm",), compiled=False, device="cpu")
    with pytest.raises(UserError, match="none of --engines auto,eager has --precision int8 on cuda:0; give another"):
        inference.names(("auto", "eager"), ("int8",), (), compiled=False, device="cuda:0")


def test_engines_and_a_peer_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, picture = tmp_path / "i.json", tmp_path / "i.png"
    flags = ["--model", "ViT-Nano/16", "--size", "32", "--batch", "2", "--engines", "eager,openvino", "--precision"]
    flags += ["bf16", "--against", "transformers", "--seconds", "0.2", "--threads", "1", "--no-peaks"]
    assert main(["bench", "inference", *flags, "--json", str(out), "--plot", str(picture)]) == 0
    record = json.loads(out.read_text())
    assert str(tmp_path) not in out.read_text()
    run = record["runs"][0]
    sides = [line["side"] for line in run["lines"]]
    assert sides[0] == run["reference"] == "transformers eager fp32"
    assert {"vitrail eager bf16", "vitrail openvino bf16", "openvino by-hand bf16"} <= set(sides)
    assert all(line["speedup"]["low"] <= line["speedup"]["value"] <= line["speedup"]["high"] for line in run["lines"])
    assert set(run["matrix"]) == {"fp32", "bf16"}
    assert set(run["machine_use"]) == {"idle", "others_share", "load_before"}
    assert picture.stat().st_size > 5000


def test_memory_is_of_a_process_of_its_own():
    what = {"kind": "inference", "side": "vitrail eager fp32", "model": "ViT-Nano/16", "batch": 2, "size": 32}
    found = alone.peak({**what, "threads": 1, "device": "cpu", "merge": 0, "against": []})
    assert found is None or found["peak"] >= found["base"] > 1 << 25


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--engines", "tensorrt"], "--engines tensorrt"),
        (["--precision", "fp16"], "--precision fp16"),
        (["--precision", ","], "at least one name"),
        (["--against", "jax"], "--against jax"),
        (["--batch", "0"], "--batch is 0"),
        (["--size", "33"], "33 x 33"),
        (["--model", "ViT-Nope/16"], "ViT-Nope"),
        (["--model", "missing.safetensors"], "missing.safetensors"),
    ],
)
def test_bad_flags_are_one_sentence(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    given = [] if "--model" in flags else ["--model", "ViT-Nano/16"]
    assert main(["bench", "inference", *given, "--engines", "eager", *flags]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert main(["bench", "speed"]) == 2
