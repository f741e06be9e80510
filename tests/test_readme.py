"""The README's commands, run as they stand, in an empty folder with a few photos in it.

What is not as it stands: `make test` is left out, the demo gets a step limit through its own variable, and training gets
flags that make it short. The paths are those that a reader has: examples/ and runs/ beside photos/. Each `vitrail` is a
process of its own, forked from one that has imported torch.
"""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import Nursery

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = ["--steps", "2", "--batch", "4", "--workers", "0"]
TRAINING = ("train", "finetune", "run")
WIDE = "import os; os.environ['COLUMNS'] = '100'"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """photos/cats and photos/dogs, bright and dark noise; and the examples."""
    folder = tmp_path_factory.mktemp("reader")
    random = np.random.default_rng(0)
    for label, level in (("cats", 60), ("dogs", 190)):
        (folder / "photos" / label).mkdir(parents=True)
        for number in range(1, 11):
            coarse = np.clip(random.normal(level, 30, (6, 8, 3)), 0, 255).astype(np.uint8)
            photo = Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC)
            photo.save(folder / "photos" / label / f"{number}.jpg")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def test_it_is_short_and_its_links_lead_somewhere() -> None:
    assert len(README.splitlines()) <= 200
    links = re.findall(r"\]\(([^)#]+)\)", README)
    inside = [link for link in links if not link.startswith("http")]
    assert len(inside) >= 4
    assert [link for link in inside if not (ROOT / link).exists()] == []


def test_it_names_every_verb_and_every_file_of_a_run() -> None:
    from vitrail.cli import VERBS

    for verb in VERBS:
        assert f"`{verb}`" in README or f"`{verb} " in README, verb


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_demo(place: Path) -> None:
    assert "make demo" in COMMANDS
    if not (ROOT / ".venv" / "bin" / "vitrail").exists():
        pytest.skip("there is no .venv in the checkout, and a test installs nothing")
    out = place / "runs" / "demo"
    # -o: the environment counts as installed, whatever its age.
    command = ["make", "-C", str(ROOT), "-o", ".venv/ready", "demo"]
    # One thread, because two that wait for each other on a busy machine take ten times as long (docs/log.md).
    environment = {**os.environ, "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    command += [f"DEMO=--steps 10 --limit 500 --out {out}"]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "after 10 steps each" in done.stdout
    for name in ("pre-trained weights", "random weights"):
        assert re.search(rf"^  {name} +[\d.]+ % \[[\d.]+, [\d.]+\] of 2,000$", done.stdout, re.MULTILINE)
    assert f"next: vitrail predict {out / 'pre-trained-weights'} PICTURE" in done.stdout
    assert (out / "curves.png").stat().st_size > 10_000


def test_the_shell_commands_in_the_order_of_the_page(place: Path) -> None:
    processes = Nursery(place)
    commands = [command for command in COMMANDS if not command.startswith("make ")]
    assert len(commands) >= 9
    assert {shlex.split(command)[1] for command in commands} >= {"train", "finetune", "run", "predict", "evaluate"}
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "vitrail"
        training = words[1] in TRAINING
        # `fit` would look for weights in the network.
        own = ["--weights", "vitrail:ViT-Micro/7"] if words[1] == "fit" else []
        code, said, error = processes.run(*words[1:], *(SHORT if training else own), first=WIDE)
        assert code == 0, f"{command}\n{said}\n{error}"
        if training and "--dry-run" not in words:
            assert "2 steps of 4 pictures" in said, command
    left = {file.name for file in (place / "runs" / "photos").iterdir()}
    promised = set(re.findall(r"`([\w.]+\.(?:html|safetensors|pt|json|jsonl|png))`", README))
    assert len(promised) >= 9
    assert promised - left == set()
    assert any("tfevents" in name for name in left)


def test_the_python(place: Path) -> None:
    (block,) = blocks("python")
    assert "minutes=20" in block
    short = block.replace("minutes=20", 'steps=2, batch=4, workers=0, size=(64, 64), model="ViT-Ti/16"')
    code, said, error = Nursery(place).run("--version", first=short)
    assert code == 0, error
    assert re.search(r"^(cats|dogs)$", said, re.MULTILINE)
    assert "torch.Size([1, 16, 192]) (4, 4)" in said
    assert (place / "untrained" / "model.safetensors").exists()
