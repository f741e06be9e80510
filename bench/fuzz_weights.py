"""Damages small checkpoints of every writable format at random: `python bench/fuzz_weights.py [--damages 200] [--seed 0]`.

Whatever is done to a file, loading it must end in one sentence, or in the model that it was. What ends in another model
is counted as silent; a traceback is a fault. Some silence no reader can break, and is left out: a flipped byte among the
numbers of a .safetensors file, which has no checksum; a square matrix transposed; equal tensors exchanged. 2 minutes.
"""

import argparse
import json
import random
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitrail.analysis.agreement import layers_of, reference_picture
from vitrail.core.errors import UserError
from vitrail.core.types import Numerics
from vitrail.models.classifier import Classifier, ClassifierConfig
from vitrail.models.vit import ViTConfig
from vitrail.weights.formats import writer
from vitrail.weights.load import load_any

SMALL: dict[str, Any] = {"width": 64, "depth": 2, "heads": 2, "mlp": 128, "patch": (8, 8), "image": (24, 24)}
FLAX, TIMM, FACE = Numerics(), Numerics("erf", 1e-6, "bicubic-antialias"), Numerics("erf", 1e-12, "bicubic")
DINO, VISION = Numerics("erf", 1e-6, "bicubic"), Numerics("erf", 1e-6, "bicubic-aligned")
MODELS: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "vitrail": ("vitrail", "model.safetensors", {"registers": 2, "layer_scale": True}, {}),
    "official": ("official", "model.npz", {"numerics": FLAX}, {"hidden": 48}),
    "big-vision": ("big-vision", "model.npz", {"numerics": FLAX, "class_token": False}, {"pool": "attention"}),
    "timm folder": ("timm", "folder", {"numerics": TIMM, "registers": 2, "prefix_positions": False}, {}),
    "timm bare": ("timm", "model.safetensors", {"numerics": TIMM, "qk_norm": True, "layer_scale": True}, {}),
    "timm pth": ("timm", "model.pth", {"numerics": TIMM}, {}),
    "hf": ("hf", "folder", {"numerics": FACE}, {}),
    "hf dinov2": ("hf", "folder", {"numerics": DINO, "layer_scale": True}, {"pool": "class-mean"}),
    "torchvision": ("torchvision", "model.safetensors", {"numerics": VISION}, {}),
    "torchvision pth": ("torchvision", "model.pth", {"numerics": VISION}, {}),
}

UNKNOWABLE = {
    "vitrail": r"flipped",
    "official": r"embedding/kernel .*\(axis 2\)",
    "big-vision": r"embedding/kernel .*\(axis 2\)|without params/pos_embedding|pos_embedding renamed",
    "timm": r"flipped|patch_embed\S* .*\(axis 1\)|without .*qkv.bias|pos_embed .*cut by one|cls_token",
    "hf": r"nothing else",
    "torchvision": r"flipped",
}
"""What a file of that kind cannot say: how many channels it takes, whether there ever was a bias, a table or a class
token's position, which digit stood in a header that has no checksum."""

KINDS = ("refused", "same", "unknowable", "silent", "traceback")

Damage = Callable[[Path, random.Random], str]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=200, help="of each format")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=measure.ROOT / "results")
    settings = parser.parse_args()
    faults: list[str] = []
    rows = []
    for name in MODELS:
        counts = Counter[str]()
        for what, ended in damaged(name, settings.damages, settings.seed):
            kind = ended.partition(": ")[0]
            if kind == "silent" and re.search(UNKNOWABLE[MODELS[name][0]], what):
                kind = "unknowable"
            counts[kind] += 1
            if kind in ("silent", "traceback"):
                faults.append(f"{name}, {what}: {ended}")
        rows.append({"format": name, **{kind: counts[kind] for kind in KINDS}})
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()))
    print(*faults, sep="\n")
    measure.write("fuzz_weights", {"seed": settings.seed, "rows": rows, "faults": faults}, settings.out)
    return 1 if faults else 0


def damaged(name: str, count: int, seed: int) -> Iterator[tuple[str, str]]:
    """(what was done, how loading ended) of each damage."""
    format, place, backbone, head = MODELS[name]
    model = ClassifierConfig(ViTConfig(**SMALL, **backbone), **{"classes": 5, "pool": "class", **head}).build(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator) + 0.5 * (parameter.ndim == 1))
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        writer(format).write(model, whole / place)
        expected = answer(whole / place)
        for number in range(count):
            chance = random.Random(f"{name} {seed} {number}")
            copy = Path(folder) / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(whole, copy)
            target = copy / place
            file = target / "model.safetensors" if target.is_dir() else target
            config = target / "config.json" if target.is_dir() else None
            damage = chance.choice([flip, cut, pad, *TENSORS, *([edit] * 4 if config else [])])
            what = damage(config if damage is edit and config else file, chance)
            yield f"damage {number}, {what}", ended(target, expected)


def answer(path: Path) -> dict[str, Tensor]:
    model = load_any(path, heads=2 if path.suffix == ".pth" else None)
    backbone = model.backbone if isinstance(model, Classifier) else model
    picture = reference_picture(backbone.config.image, backbone.config.channels)
    return layers_of(model.eval(), backbone.preprocess.normalize(picture[None]))


def ended(path: Path, expected: dict[str, Tensor]) -> str:
    try:
        found = answer(path)
    except UserError as error:
        said = str(error)
        return f"traceback: several lines: {said!r}" if "\n" in said else f"refused: {said}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {str(error).splitlines()[:1]}"
    if found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found):
        return "same: "
    wrong = [name for name in expected if name not in found or not torch.equal(found[name], expected[name])]
    return f"silent: {', '.join(wrong) or 'more comes out'}"


# Damage to bytes


def flip(file: Path, chance: random.Random) -> str:
    content = bytearray(file.read_bytes())
    end = len(content)
    if file.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")  # what comes after has no checksum
    place, bit = chance.randrange(end), chance.randrange(8)
    content[place] ^= 1 << bit
    file.write_bytes(content)
    return f"bit {bit} of byte {place} of {file.name} flipped"


def cut(file: Path, chance: random.Random) -> str:
    content = file.read_bytes()
    size = chance.randrange(len(content))
    file.write_bytes(content[:size])
    return f"{file.name} cut from {len(content)} to {size} bytes"


def pad(file: Path, chance: random.Random) -> str:
    content = file.read_bytes()
    more, place = chance.randbytes(chance.randrange(1, 200)), chance.choice((0, len(content), len(content) // 2))
    file.write_bytes(content[:place] + more + content[place:])
    return f"{len(more)} bytes put into {file.name} at {place}"


def edit(file: Path, chance: random.Random) -> str:
    """One entry of a config.json, at any depth, is removed or becomes something else."""
    data = json.loads(file.read_text())
    table = data
    while True:
        key = chance.choice(list(table))
        if not isinstance(table[key], dict) or not table[key] or chance.random() < 0.3:
            break
        table = table[key]
    before = table[key]
    if chance.random() < 0.5:
        del table[key]
        after: Any = "nothing"
    else:
        after = table[key] = chance.choice([None, -1, 0, 7, "other", [], {}, True, 1e30, [1, 2, 3], [1e400]])
    file.write_text(json.dumps(data))
    return f"config.json's {key} from {str(before)[:40]} to {after}"


# Damage to tensors, in a file that is whole as such


def changed(file: Path, change: Callable[[dict[str, Tensor]], str]) -> str:
    if file.suffix == ".npz":
        with np.load(file) as arrays:
            tensors = {name: torch.from_numpy(arrays[name].copy()) for name in arrays.files}
        what = change(tensors)
        np.savez(file, **{name: tensor.numpy() for name, tensor in tensors.items()})
    elif file.suffix == ".pth":
        tensors = torch.load(file, weights_only=True)
        what = change(tensors)
        torch.save(tensors, file)
    else:
        tensors, metadata = load_file(file), header(file)
        what = change(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata)
    return what


def header(file: Path) -> dict[str, str]:
    content = file.read_bytes()
    found: dict[str, str] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__", {})
    return found


def reshaping(file: Path, chance: random.Random) -> str:
    def change(tensors: dict[str, Tensor]) -> str:
        name = chance.choice([name for name, tensor in tensors.items() if tensor.ndim])
        tensor = tensors[name]
        axis = chance.randrange(tensor.ndim)
        other = (axis + 1) % tensor.ndim
        made = {
            "cut by one": lambda: tensor.narrow(axis, 0, tensor.shape[axis] - 1),
            "cut in half": lambda: tensor.narrow(axis, 0, tensor.shape[axis] // 2),
            "one longer": lambda: torch.cat([tensor, tensor.narrow(axis, 0, 1)], axis),
            "twice": lambda: torch.cat([tensor, tensor], axis),
            "a leading axis more": lambda: tensor[None],
            "a trailing axis more": lambda: tensor[..., None],
            "flat": lambda: tensor.flatten(),
            "empty": lambda: tensor[:0],
            "one number": lambda: tensor.flatten()[0],
            "whole numbers": lambda: tensor.to(torch.int32),
            "NaN": lambda: torch.where(torch.arange(tensor.numel()).view(tensor.shape) == 0, torch.nan, tensor),
            "transposed": lambda: tensor.transpose(axis, other),
        }
        how = chance.choice([how for how in made if how != "transposed" or tensor.shape[axis] != tensor.shape[other]])
        tensors[name] = made[how]().clone()
        return f"{name} {tuple(tensor.shape)} {how} (axis {axis})"

    return changed(file, change)


def renaming(file: Path, chance: random.Random) -> str:
    def change(tensors: dict[str, Tensor]) -> str:
        name = chance.choice(list(tensors))
        letter = chance.randrange(len(name))
        new = chance.choice([name[:letter] + name[letter + 1 :], name + "x", "x." + name, name.upper()])
        tensors[new or "x"] = tensors.pop(name)
        return f"{name} renamed {new}"

    return changed(file, change)


def removing(file: Path, chance: random.Random) -> str:
    def change(tensors: dict[str, Tensor]) -> str:
        # One tensor, or all of that kind, as where a writer forgot it.
        name = chance.choice(list(tensors))
        kind = "".join("#" if letter.isdigit() else letter for letter in name)
        alike = [one for one in tensors if "".join("#" if letter.isdigit() else letter for letter in one) == kind]
        gone = chance.choice([[name], alike])
        for one in gone:
            del tensors[one]
        return f"without {', '.join(gone)}"

    return changed(file, change)


def exchanging(file: Path, chance: random.Random) -> str:
    def change(tensors: dict[str, Tensor]) -> str:
        one, other = chance.sample(list(tensors), 2)
        if tensors[one].shape == tensors[other].shape:
            del tensors[one]
            return f"without {one}"
        tensors[one], tensors[other] = tensors[other], tensors[one]
        return f"{one} and {other} exchanged"

    return changed(file, change)


def adding(file: Path, chance: random.Random) -> str:
    def change(tensors: dict[str, Tensor]) -> str:
        name = chance.choice(list(tensors))
        digits = [place for place, letter in enumerate(name) if letter.isdigit()]
        new = f"{name}_2" if not digits else name[: digits[-1]] + "7" + name[digits[-1] + 1 :]
        tensors[new] = tensors[name].clone()
        return f"{new} added, a copy of {name}"

    return changed(file, change)


TENSORS: tuple[Damage, ...] = (reshaping, reshaping, reshaping, renaming, removing, exchanging, adding)


if __name__ == "__main__":
    sys.exit(main())
