"""Makes `sample:fashion` from the original Fashion-MNIST: `python scripts/make_fashion_sample.py FOLDER`.

The pictures are stored PNGs (filtered, not deflated), because Parquet's own compression then sees all of them at once:
395 bytes a picture with zstd, where pictures deflated one by one take 456 under the same zstd and 511 without.

Prints the sha256 of the files, which depends on the versions of Pillow and Arrow, and of the pixels and labels, which
depends on nothing but the choice; tests hold the second.
"""

import argparse
import gzip
import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vitrail.data.sources import FASHION

SEED = 2020
SPLITS = {"train": ("train", 1000), "test": ("t10k", 200)}  # name here -> name of the original, pictures a class
SAMPLES = Path(__file__).parents[1] / "src" / "vitrail" / "data" / "samples"


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes, gzipped or not: 0, 0, type 8, number of axes, big-endian lengths, data."""
    packed = path.with_name(path.name + ".gz")
    raw = gzip.decompress(packed.read_bytes()) if packed.exists() else path.read_bytes()
    if raw[:3] != b"\x00\x00\x08":
        raise SystemExit(f"{path} is not an idx file of bytes.")
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def choose(labels: np.ndarray, each: int, rng: np.random.Generator) -> np.ndarray:
    """Places of `each` pictures of every class, drawn without replacement, in their original order."""
    drawn = [rng.choice(np.flatnonzero(labels == label), each, replace=False) for label in range(len(FASHION))]
    return np.sort(np.concatenate(drawn))


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def table(images: np.ndarray, labels: np.ndarray, names: list[str]) -> pa.Table:
    """Columns image: {bytes, path} and label: int64, with the types that the `datasets` library reads back."""
    picture = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(FASHION)}}
    schema = pa.schema(
        [("image", picture), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    rows = [{"bytes": png(pixels), "path": name} for pixels, name in zip(images, names, strict=True)]
    return pa.table([pa.array(rows, picture), pa.array(labels.astype(np.int64))], schema=schema)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path, help="folder with the four idx files, gzipped or not")
    parser.add_argument("--out", type=Path, default=SAMPLES, help="folder to write to")
    arguments = parser.parse_args()
    rng = np.random.default_rng(SEED)
    for split, (original, each) in SPLITS.items():
        images = read_idx(arguments.original / f"{original}-images-idx3-ubyte")
        labels = read_idx(arguments.original / f"{original}-labels-idx1-ubyte")
        places = choose(labels, each, rng)
        file = arguments.out / f"fashion-{split}.parquet"
        pq.write_table(
            table(images[places], labels[places], [f"{split}/{place:05d}.png" for place in places]),
            file,
            compression="zstd",
            compression_level=19,
            use_dictionary=False,
            write_statistics=False,
            data_page_size=1 << 26,
        )
        content = hashlib.sha256(images[places].tobytes() + labels[places].tobytes()).hexdigest()
        print(f"{file.name}: {len(places)} pictures, {file.stat().st_size:,} bytes")
        print(f"  file   sha256 {hashlib.sha256(file.read_bytes()).hexdigest()}")
        print(f"  pixels sha256 {content}")


if __name__ == "__main__":
    main()
