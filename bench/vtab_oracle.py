"""TFDS against our reading of VTAB: the same small owners' files, prepared by TFDS's own readers, must give the same draw.

    python bench/vtab_oracle.py prepare DIR     where tensorflow-datasets, tensorflow-cpu, h5py and opencv are installed
    python bench/vtab_oracle.py compare DIR     where vitrail is: TFDS's folders against the owners' files, pixel by pixel

Caltech101, Sun397, Camelyon and Retinopathy are not compared: their owners' files are not read (data/vtab_owners.py).
"""

import datetime
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import benchmark_files as made

SETS = {
    "cifar100": "cifar100:3.*.*",
    "svhn_cropped": "svhn_cropped:3.*.*",
    "dtd": "dtd:3.*.*",
    "oxford_iiit_pet": "oxford_iiit_pet:*.*.*",
    "oxford_flowers102": "oxford_flowers102:2.*.*",
    "eurosat": "eurosat/rgb:2.*.*",
    "resisc45": "resisc45:3.*.*",
    "smallnorb": "smallnorb:2.*.*",
    "clevr": "clevr:3.*.*",
    "kitti": "kitti:3.*.*",
    "dsprites": "dsprites:2.*.*",
    "dmlab": "dmlab:2.*.*",
}


def owners(root: Path, labels: dict[str, list[str]]) -> None:
    made.cifar_binary(root / "cifar100/cifar-100-binary", 100, 60)
    made.svhn(root / "svhn_cropped", 60, 20)
    made.dtd(root / "dtd/dtd", each=12)
    made.pets(root / "oxford_iiit_pet", 40, 12)
    made.flowers(root / "oxford_flowers102", 20)
    made.class_folders(root / "eurosat/2750", tuple(labels["eurosat"]), 6)
    made.class_folders(root / "resisc45/NWPU-RESISC45", tuple(labels["resisc45"]), 3)
    made.norb(root / "smallnorb", 50, 40, zipped=False)
    made.clevr(root / "clevr/CLEVR_v1.0", 60, 20)
    made.kitti(root / "kitti", 90, 30)
    made.dsprites(root / "dsprites", 200)


def prepare(root: Path) -> None:
    import h5py
    import numpy as np
    import tensorflow as tf
    import tensorflow_datasets as tfds

    shutil.rmtree(root, ignore_errors=True)
    files = root / "owners"
    names = {
        name: list(tfds.builder(SETS[name], data_dir=root / "tfds").info.features["label"].names)
        for name in ("eurosat", "resisc45")
    }
    owners(files, names)
    with np.load(next((files / "dsprites").glob("*.npz"))) as held, h5py.File(root / "dsprites.h5", "w") as out:
        out["imgs"] = held["imgs"]
        out["latents/classes"], out["latents/values"] = held["latents_classes"], held["latents_values"]
    random = np.random.default_rng(0)
    (files / "dmlab").mkdir()
    for split, count in (("train", 40), ("validation", 15), ("test", 15)):
        with tf.io.TFRecordWriter(str(files / f"dmlab/dmlab-{split}.tfrecord")) as writer:
            for number in range(count):
                image = tf.io.encode_png(random.integers(0, 256, (360, 480, 3), dtype=np.uint8)).numpy()
                listed = {"image": [image], "filename": [f"{split}_{number}.png".encode()]}
                feature = {k: tf.train.Feature(bytes_list=tf.train.BytesList(value=v)) for k, v in listed.items()}
                feature["label"] = tf.train.Feature(int64_list=tf.train.Int64List(value=[int(random.integers(0, 6))]))
                writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    for name, spec in SETS.items():
        base = files / name
        norb = {
            f"{word}_{part}": base / made_name
            for word, instances in (("training", "46789"), ("testing", "01235"))
            for part in ("dat", "cat", "info")
            for made_name in [f"smallnorb-5x{instances}x9x18x6x2x96x96-{word}-{part}.mat"]
        }
        given: dict[str, Any] = {
            "svhn_cropped": {
                s: base / f"{'train' if s == 'train' else 'test'}_32x32.mat" for s in ("train", "test", "extra")
            },
            "oxford_iiit_pet": {"images": base, "annotations": base},
            "oxford_flowers102": {"images": base, "labels": base / "imagelabels.mat", "setid": base / "setid.mat"},
            "smallnorb": norb,
            "kitti": {"images": base, "annotations": base, "devkit": base},
            "dsprites": root / "dsprites.h5",
        }

        files_given = given.get(name, base)

        def hand(*_: Any, found: Any = files_given, **__: Any) -> Any:
            return {key: str(path) for key, path in found.items()} if isinstance(found, dict) else str(found)

        def archive(_: Any, path: Any) -> Any:
            for file in sorted(Path(path).rglob("*")):
                if file.is_file():
                    yield str(file.relative_to(path)), file.open("rb")

        manager = tfds.download.DownloadManager
        manager.download, manager.download_and_extract, manager.extract = hand, hand, lambda _, path: path
        manager.iter_archive, manager.manual_dir = archive, property(lambda _, base=base: base)
        builder = tfds.builder(spec, data_dir=root / "tfds")
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
        print(builder.info.full_name, {split: info.num_examples for split, info in builder.info.splits.items()})


def compare(root: Path) -> None:
    import numpy as np

    from vitrail.core.types import Source
    from vitrail.data import vtab, vtab_sample
    from vitrail.data.decode import decode

    def pixels(source: Source, index: int) -> Any:
        return np.asarray(decode(source[index].picture))

    rows = []
    for task in vtab.TASKS.values():
        if task.folder not in SETS:
            continue
        theirs, ours = vtab_sample.find(task, root / "tfds"), vtab_sample.find(task, root / "owners" / task.folder)
        assert theirs is not None, task.name
        assert ours is not None, task.name
        assert theirs.origin.startswith("TFDS") and ours.origin.startswith("its owners"), (theirs.origin, ours.origin)  # noqa: PT018
        counts = {}
        for split in ("train", "validation", "test"):
            a, b = getattr(theirs, split), getattr(ours, split)
            same = len(a) == len(b) > 0 and np.array_equal(a.labels, b.labels)
            same = same and all(np.array_equal(pixels(a, i), pixels(b, i)) for i in range(len(a)))
            counts[split] = {"pictures": len(a), "same": bool(same)}
        rows.append({"task": task.name, **counts})
        print(task.name, counts)
    everything = all(part["same"] for row in rows for part in row.values() if isinstance(part, dict))
    date = datetime.date.today().isoformat()
    result = {"date": date, "tasks": rows, "all_equal": everything}
    Path("results").mkdir(exist_ok=True)
    Path(f"results/vtab_oracle-{date}.json").write_text(json.dumps(result, indent=1) + "\n")
    print("all equal" if everything else "DIFFERENT")


if __name__ == "__main__":
    {"prepare": prepare, "compare": compare}[sys.argv[1]](Path(sys.argv[2]).resolve())
