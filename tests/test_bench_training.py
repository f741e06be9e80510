"""vitrail bench training: the step beside a peer's, and the memory a run will need."""

import json
from pathlib import Path

import pytest
import torch

from vitrail.benchmark import alone, planning, training
from vitrail.cli import main
from vitrail.commands.bench_training import in_bytes
from vitrail.core.errors import UserError
from vitrail.experiments.footprint import footprint
from vitrail.models.classifier import ClassifierConfig
from vitrail.weights import zoo

CPU = torch.device("cpu")


def tiny() -> ClassifierConfig:
    return ClassifierConfig(zoo.config("ViT-Nano/16", (64, 64)), 10)


def test_a_step_trains_and_so_does_the_peers():
    model = zoo.create("ViT-Nano/16", classes=10, image=(32, 32))
    batch = training.batch_of(model.preprocess, 4, 10)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    step = training.vitrail_step(model, batch, CPU, "fp32")
    step()
    step()
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    training.peer_step("transformers", model, batch, CPU, "bf16")()


def test_a_batch_from_the_host_trains_alike():
    logits = []
    for fresh in (False, True):
        model = zoo.create("ViT-Nano/16", classes=10, image=(32, 32))
        step = training.vitrail_step(model, training.batch_of(model.preprocess, 4, 10), CPU, "fp32", fresh=fresh)
        step()
        step()
        with torch.no_grad():
            logits.append(model.eval()(torch.ones(1, 3, 32, 32)))
    assert logits[0].abs().max() > 0
    torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=0)


def test_the_share_that_is_done_is_what_the_last_block_leaves_out():
    model = tiny().build()
    config, tokens = model.config.backbone, 17
    width, others = config.width, 17 - 1
    # Of the other tokens no queries, no rows of the map, no output and no MLP.
    left_out = others * (2 * width**2 + 2 * tokens * width + 2 * width * config.mlp)
    assert training.done(model) == pytest.approx(1 - left_out / config.macs(), rel=1e-6)


def test_the_footprints_parts_are_what_the_model_is():
    config = tiny()
    found = footprint(config, 4)
    assert found.weights == 4 * config.parameters()
    assert found.gradients == found.weights
    assert found.optimiser == pytest.approx(2 * found.weights, rel=0.01)
    # Activations go while gradients come, so the peak need not hold both whole.
    assert found.peak > found.weights + found.optimiser + max(found.gradients, found.activations)


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing_and_bf16():
    config = tiny()
    kept = [footprint(config, batch).activations for batch in (2, 4, 6)]
    assert kept[2] - kept[1] == kept[1] - kept[0] > 0
    whole = footprint(config, 16)
    assert footprint(config, 16, checkpointing=True).activations < whole.activations / 2
    assert footprint(config, 16, precision="bf16").activations < whole.activations
    assert footprint(config, 16, accumulate=4).activations == footprint(config, 4).activations


def test_what_is_kept_is_what_torch_keeps():
    """Counted without numbers against torch's own list of saved tensors, of a real step."""
    config, batch = tiny(), 4
    model = config.build()
    given = training.batch_of(model.preprocess, batch, 10)
    saved: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = torch.nn.functional.cross_entropy(model(given.views[0]).float(), given.targets.values)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = sum(size for pointer, size in saved.items() if pointer not in own)
    assert loss.isfinite()
    assert footprint(config, batch).activations == pytest.approx(kept, rel=0.05)


def test_the_plan_is_within_ten_per_cent_of_a_real_run():
    what = {"kind": "training", "side": "vitrail fp32", "model": "ViT-Ti/16", "batch": 8, "size": 224, "threads": 1}
    what |= {"device": "cpu", "precision": "fp32", "compile": False, "checkpointing": False, "accumulate": 1}
    found = alone.peak({**what, "side": "vitrail"})
    if found is None:
        return  # a system that does not say
    planned = planning.plan("ViT-Ti/16", 8, 224, precision="fp32", limit=1 << 34).peak
    assert planned == pytest.approx(found["peak"], rel=0.10)


def test_a_plan_names_what_fits_and_each_does():
    given = {"precision": "fp32", "classes": 10}
    roomy = planning.plan("ViT-Ti/16", 64, 64, limit=1 << 34, **given)
    assert roomy.fits
    assert not roomy.options
    limit = roomy.peak - roomy.parts["kept for the backward pass"] // 5
    tight = planning.plan("ViT-Ti/16", 64, 64, limit=limit, **given)
    assert not tight.fits
    assert {option.flags.split()[0] for option in tight.options} == {"--checkpointing", "--accumulate", "--batch"}
    assert all(option.peak <= limit for option in tight.options)
    (parts,) = (option for option in tight.options if option.flags.startswith("--accumulate"))
    assert parts.cost == "the same numbers, but for what is drawn at random"


def test_plan_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "plan.json"
    flags = ["--model", "ViT-Nano/16", "--size", "64", "--batch", "4", "--plan", "--memory", "8GiB", "--json", str(out)]
    assert main(["bench", "training", *flags]) == 0
    assert "it fits" in capsys.readouterr().out
    assert json.loads(out.read_text())["plans"][0]["fits"]
    assert main(["bench", "training", *flags[:6], "--plan", "--memory", "1MiB"]) == 1
    assert "smaller --model" in capsys.readouterr().out


def test_training_is_measured_beside_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, picture = tmp_path / "t.json", tmp_path / "t.png"
    flags = ["--model", "ViT-Nano/16", "--size", "32", "--batch", "2", "--against", "transformers", "--seconds", "0.2"]
    flags += ["--threads", "1", "--no-peaks", "--json", str(out), "--plot", str(picture)]
    assert main(["bench", "training", *flags]) == 0
    run = json.loads(out.read_text())["runs"][0]
    assert [line["side"] for line in run["lines"]] == ["transformers bf16", "vitrail bf16"]
    assert len(run["lines"][0]["seconds"]) == len(run["lines"][1]["seconds"]) >= 5
    assert run["lines"][0]["speedup"]["value"] == 1.0
    assert picture.stat().st_size > 5000
    assert "vitrail bf16" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "size"), [("8GiB", 8 << 30), ("8G", 8 << 30), ("500 MB", 500_000_000), ("9", 9)])
def test_amounts_of_memory(words: str, size: int):
    assert in_bytes(words) == size


@pytest.mark.parametrize("words", ["", "lots", "8XB", "-1GiB", "0", "1.2.3G"])
def test_amounts_that_are_none(words: str):
    with pytest.raises(UserError, match="--memory"):
        in_bytes(words)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--batch", "0"], "--batch is 0"),
        (["--size", "-1"], "--size is -1"),
        (["--seconds", "-1"], "--seconds is -1"),
        (["--memory", "8GiB"], "--memory is for --plan"),
        (["--checkpointing"], "--checkpointing is for --plan"),
        (["--plan", "--accumulate", "0"], "--accumulate"),
        (["--plan", "--memory", "much"], "--memory much"),
        (["--against", "jax"], "--against jax"),
        (["--precision", "int8"], "int8"),
        (["--threads", "99999"], "--threads is 99999"),
    ],
)
def test_bad_flags_are_one_sentence(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "training", "--model", "ViT-Nano/16", *flags]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
    assert main(["bench", "training", "--model", "ViT-Nope/16", "--plan", "--memory", "8GiB"]) == 2
