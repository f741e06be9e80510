"""Puts a finished run's best weights into the package, in bf16: `python scripts/make_own_weights.py RUN`.

RUN is what the model card, src/vitrail/weights/own/ViT-Micro_7.md, says how to train. Prints the file's size and SHA-256.
"""

import argparse
import hashlib
from pathlib import Path

import torch

import vitrail
from vitrail.weights import own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder of `vitrail train` or `vitrail pretrain`")
    parser.add_argument("--id", default="vitrail:ViT-Micro/7", choices=tuple(own.OWN))
    arguments = parser.parse_args()
    file = own.FOLDER / own.OWN[arguments.id]
    vitrail.save(vitrail.load(arguments.run).to(torch.bfloat16), file)
    print(f"{file.name}: {file.stat().st_size:,} bytes, sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
