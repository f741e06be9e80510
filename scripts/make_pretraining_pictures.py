"""The pictures that Vitrail's own small weights were pre-trained on.

    python scripts/make_pretraining_pictures.py CIFAR FASHION OUT

CIFAR: the folder that make_cifar10_parquet.py wrote. FASHION: the four idx files of Fashion-MNIST. OUT/clothes gets
what Fashion-MNIST's training pictures hold beyond `sample:fashion`, without whatever resembles one of its 12,000;
OUT/both gets these and CIFAR-10's training pictures under the classes of both; OUT/choice has the rest of Fashion-MNIST's
test pictures as its test split, to choose by, and the sample's training pictures.

Two clothes are alike here when the difference of their pixels has less than `ALIKE` of the smaller one's own energy, be
one of them turned or moved by a pixel. Weights that a demo fine-tunes must not know the pictures that it is tested on.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from make_cifar10_parquet import CLASSES
from make_fashion_sample import SEED, SPLITS, choose, read_idx, table

from vitrail.data.sources import FASHION

ALIKE = 0.03
"""Energy of the difference over that of the picture; of unchanged copies it is 0, of half of all clothes above 0.1."""


def alike(images: np.ndarray, sample: np.ndarray) -> np.ndarray:
    """(n,) bool: which pictures (n, 28, 28) resemble one of the sample (m, 28, 28), as it is, turned or moved by a pixel."""
    points = images.reshape(len(images), -1).astype(np.float32)
    energy = np.square(points).sum(1)
    found = np.zeros(len(images), bool)
    turned = [sample, sample[:, :, ::-1]]
    moved = [np.roll(s, (down, across), (1, 2)) for s in turned for down in (-1, 0, 1) for across in (-1, 0, 1)]
    for copies in moved:
        others = copies.reshape(len(copies), -1).astype(np.float32)
        lengths = np.square(others).sum(1)
        for first in range(0, len(points), 2000):
            part = slice(first, first + 2000)
            distance = energy[part, None] - 2 * points[part] @ others.T + lengths
            found[part] |= (distance < ALIKE * np.minimum(energy[part, None], lengths)).any(1)
    return found


def both(cifar: Path, clothes: Path, out: Path) -> None:
    """CIFAR-10's classes first, then the clothes', in files as they came."""
    out.mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"names": [*CLASSES, *FASHION], "_type": "ClassLabel"}}
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    for number, (path, shift) in enumerate([*((p, 0) for p in sorted(cifar.glob("train-*.parquet"))), (clothes, 10)]):
        read = pq.read_table(path)
        labels = pa.array(np.asarray(read["label"]) + shift, pa.int64())
        joined = read.set_column(read.schema.get_field_index("label"), "label", labels)
        pq.write_table(joined.replace_schema_metadata(described), out / f"train-{number}.parquet", compression="zstd")


def main(cifar: Path, fashion: Path, out: Path) -> None:
    rng, kept, sample = np.random.default_rng(SEED), {}, []
    images, labels = {}, {}
    for name, (original, each) in SPLITS.items():
        images[name] = read_idx(fashion / f"{original}-images-idx3-ubyte")
        labels[name] = read_idx(fashion / f"{original}-labels-idx1-ubyte")
        places = choose(labels[name], each, rng)
        sample.append(images[name][places])
        kept[name] = np.setdiff1d(np.arange(len(labels[name])), places)
    known = alike(images["train"][kept["train"]], np.concatenate(sample))
    print(f"{known.sum():,} of {len(known):,} training pictures resemble one of the sample and are left out")
    places = kept["train"][~known]
    for folder in ("clothes", "choice"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    names = [f"train/{place:05d}.png" for place in places]
    clothes = out / "clothes" / "train-0.parquet"
    pq.write_table(table(images["train"][places], labels["train"][places], names), clothes, compression="zstd")
    rest = kept["test"]
    names = [f"test/{place:05d}.png" for place in rest]
    pq.write_table(table(images["test"][rest], labels["test"][rest], names), out / "choice" / "test-0.parquet")
    samples = Path(__file__).parents[1] / "src" / "vitrail" / "data" / "samples"
    shutil.copy(samples / "fashion-train.parquet", out / "choice" / "train-0.parquet")
    both(cifar, clothes, out / "both")
    print(f"{len(places):,} clothes to pre-train on, {len(rest):,} to choose by, in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit("usage: make_pretraining_pictures.py CIFAR FASHION OUT")
    main(*map(Path, sys.argv[1:]))
