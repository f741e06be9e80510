"""Checkpoints are opened without trust: the same numbers as their own libraries read, or one sentence; never code."""

import argparse
import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vitrail.core.errors import UserError
from vitrail.weights.conversion import Keys
from vitrail.weights.source import Checkpoint, open_checkpoint

RNG = np.random.default_rng(0)
ARRAYS = {
    "a/kernel": RNG.normal(size=(5, 7)).astype(np.float32),
    "a/columns": np.asfortranarray(RNG.normal(size=(4, 3, 2)).astype(np.float32)),
    "b/half": RNG.normal(size=(3,)).astype(np.float16),
    "b/double": RNG.normal(size=(2, 2)),
    "number": np.float32(3.5),
    "empty": np.zeros((0, 4), np.float32),
    "count": np.arange(6, dtype=np.int64).reshape(2, 3),
    "yes": np.array([True, False]),
}


def refusal(path: Path, match: str, read: bool = True) -> str:
    """The one sentence that opening (or, with `read`, reading all) ends in."""
    with pytest.raises(UserError, match=match) as raised:
        everything(open_checkpoint(path)) if read else open_checkpoint(path)
    assert "\n" not in str(raised.value)
    assert str(path.name) in str(raised.value)
    return str(raised.value)


def everything(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {name: checkpoint.read(name) for name in checkpoint.names}


def flipped(path: Path, place: int) -> Path:
    content = bytearray(path.read_bytes())
    content[place] ^= 0x55
    path.write_bytes(content)
    return path


# NumPy


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_reads_as_numpy_reads_it(tmp_path: Path, save: Callable[..., None]) -> None:
    save(tmp_path / "some.npz", **ARRAYS)
    checkpoint = open_checkpoint(tmp_path / "some.npz")
    assert checkpoint.container == "npz"
    assert checkpoint.names == tuple(ARRAYS)
    assert checkpoint.config is None
    for name, array in np.load(tmp_path / "some.npz", allow_pickle=False).items():
        assert checkpoint.shape(name) == array.shape
        assert checkpoint.dtype(name) == array.dtype.name
        tensor = checkpoint.read(name)
        assert tensor.is_contiguous()
        assert np.array_equal(tensor.numpy(), array)
        assert tensor.data_ptr() % 16 == 0


def test_bfloat16_as_two_nameless_bytes(tmp_path: Path) -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    np.savez(tmp_path / "half.npz", x=values.view(torch.int16).numpy().view("V2"))
    checkpoint = open_checkpoint(tmp_path / "half.npz")
    assert checkpoint.dtype("x") == "bfloat16"
    assert torch.equal(checkpoint.read("x"), values)


def test_the_sha256_is_the_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "some.npz", **ARRAYS)
    expected = hashlib.sha256((tmp_path / "some.npz").read_bytes()).hexdigest()
    assert open_checkpoint(tmp_path / "some.npz").sha256() == expected


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_byte_in_an_npz_is_found_where_it_is(tmp_path: Path, save: Callable[..., None]) -> None:
    file = tmp_path / "some.npz"
    save(file, first=RNG.normal(size=1000), second=RNG.normal(size=1000))
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo("second.npy")
    flipped(file, member.header_offset + 30 + len("second.npy") + 20 + member.compress_size // 2)
    checkpoint = open_checkpoint(file)
    checkpoint.read("first")
    with pytest.raises(UserError, match=r"some\.npz is damaged at second .*: copy it again"):
        checkpoint.read("second")


def test_a_cut_npz_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "some.npz"
    np.savez(file, **ARRAYS)
    content = file.read_bytes()
    for length in (3, 100, len(content) // 2, len(content) - 30, len(content) - 1):
        file.write_bytes(content[:length])
        refusal(file, "cut short, at .* bytes, or damaged|is no .npz")
    # The table of contents is whole, and the numbers before it are gone.
    with zipfile.ZipFile(file.with_name("hole.npz"), "w") as archive:
        archive.writestr("x.npy", (b"\x93NUMPY\x01\x00" + content[100:200]))
    refusal(file.with_name("hole.npz"), "damaged at x")


def npy(header: str, data: bytes = b"") -> bytes:
    text = (header + "\n").encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9000000000, 9000000000)}"), "which do not fit"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,)}"), "which do not fit"),
        (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,)}", bytes(12)), "of shape .2,. in 12 bytes"),
        (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}", pickle.dumps([1])), "pickled Python objects"),
        (npy("{'descr': '>f4', 'fortran_order': False, 'shape': (1,)}", bytes(4)), "of type >f4"),
        (npy("{'descr': '<U2', 'fortran_order': False, 'shape': (1,)}", bytes(8)), "of type <U2"),
        (npy("{'descr': '<f4', 'shape': (1,)}", bytes(4)), "damaged at x"),
        (npy("__import__('os').system('false')"), "damaged at x"),
        (b"\x93NUMPY\x07\x00" + bytes(100), "damaged at x .*version 7"),
        (b"", "damaged at x"),
    ],
)
def test_a_forged_entry_is_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    with zipfile.ZipFile(tmp_path / "forged.npz", "w") as archive:
        archive.writestr("x.npy", content)
    refusal(tmp_path / "forged.npz", message, read=False)


def test_an_object_array_is_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "object.npz", x=np.array([Trap(tmp_path / "sprung")], dtype=object), allow_pickle=True)
    refusal(tmp_path / "object.npz", "unpickling can run any code")
    assert not (tmp_path / "sprung").exists()


def test_a_zip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        header = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (20000000,)}")
        archive.writestr("x.npy", header + bytes(80_000_000))
    refusal(tmp_path / "bomb.npz", r"claims to unpack to 80,.*zip bomb")


def test_zips_of_other_things_are_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.npz", "w") as archive:
        archive.writestr("cat.png", b"x")
    refusal(tmp_path / "photos.npz", "a zip archive of other things")
    with zipfile.ZipFile(tmp_path / "nothing.npz", "w"):
        pass
    refusal(tmp_path / "nothing.npz", "a zip archive of other things")
    with zipfile.ZipFile(tmp_path / "twice.npz", "w") as archive:
        one = npy("{'descr': '<f4', 'fortran_order': False, 'shape': ()}", bytes(4))
        archive.writestr("x.npy", one)
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("x.npy", one)
    refusal(tmp_path / "twice.npz", "holds x twice")


# safetensors


TENSORS = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in ARRAYS.items() if array.ndim}


def test_safetensors_read_as_the_library_reads_them(tmp_path: Path) -> None:
    tensors = {**TENSORS, "bf": torch.randn(4, 2).bfloat16(), "scalar": torch.tensor(2.0)}
    save_file(tensors, tmp_path / "some.safetensors", metadata={"who": "me"})
    checkpoint = open_checkpoint(tmp_path / "some.safetensors")
    assert checkpoint.container == "safetensors"
    assert checkpoint.metadata == {"who": "me"}
    assert set(checkpoint.names) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == str(tensor.dtype).removeprefix("torch.")
        assert torch.equal(checkpoint.read(name), tensor)
        assert checkpoint.read(name).data_ptr() % 16 == 0


def forged(path: Path, header: object, data: bytes = bytes(64)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 64]}}, "of shape .4,. in 64 bytes"),
        ({"x": {"dtype": "F32", "shape": [2, -2], "data_offsets": [16, 0]}}, "damaged header"),
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [-8, 8]}}, "damaged header"),
        ({"x": {"dtype": "Q7", "shape": [4], "data_offsets": [0, 16]}}, "damaged header"),
        ({"x": {"dtype": "F32", "shape": [4]}}, "damaged header"),
        ({"x": 7}, "damaged header"),
        ({"x": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}, "cut short"),
        (b"{not json at all", "damaged header"),
        (b'{"x":' + b"[" * 100_000, "damaged header"),
        ({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16, 16]}}, "damaged header"),
        ({"x": {"dtype": "F32", "shape": [12], "data_offsets": [16, 64]}}, "damaged header"),
        ({name: {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]} for name in "xy"}, "damaged header"),
        ({"x": {"dtype": "F32", "shape": [15], "data_offsets": [0, 60]}}, "has 4 bytes more than it says"),
    ],
)
def test_a_forged_header_is_one_sentence(tmp_path: Path, header: object, message: str) -> None:
    refusal(forged(tmp_path / "forged.safetensors", header), message)


def test_bytes_put_into_a_safetensors_file_are_noticed(tmp_path: Path) -> None:
    """They would move all numbers behind them, and only the length shows it."""
    save_file(TENSORS, tmp_path / "some.safetensors")
    content = (tmp_path / "some.safetensors").read_bytes()
    (tmp_path / "some.safetensors").write_bytes(content[:-100] + bytes(8) + content[-100:])
    refusal(tmp_path / "some.safetensors", "has 8 bytes more than it says")


@pytest.mark.parametrize("header", [{}, {"__metadata__": {"a": "b"}}])
def test_a_header_without_tensors(tmp_path: Path, header: object) -> None:
    refusal(forged(tmp_path / "forged.safetensors", header, b""), "holds no tensors")


def test_a_safetensors_file_that_is_cut_under_way_is_one_sentence(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "some.safetensors")
    content = (tmp_path / "some.safetensors").read_bytes()
    checkpoint = open_checkpoint(tmp_path / "some.safetensors")
    (tmp_path / "some.safetensors").write_bytes(content[:-100])
    with pytest.raises(UserError, match=r"is damaged at .*the file ends there"):
        everything(checkpoint)
    for length in (9, 100, len(content) - 1):
        (tmp_path / "some.safetensors").write_bytes(content[:length])
        refusal(tmp_path / "some.safetensors", "cut short|is no .npz")


# torch


class Trap:
    """Pickled, it writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch '{self.file}'",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_torch_file_is_flattened_and_its_wrappers_stay_visible(tmp_path: Path, zipped: bool) -> None:
    data = {
        "model": OrderedDict({"module.x": TENSORS["a/kernel"], "module.y": torch.nn.Parameter(torch.ones(2, 2).t())}),
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"lr": 0.1, "params": [0, 1]}]},
        "args": argparse.Namespace(arch="vit_small", patch_size=16, nested=argparse.Namespace(a=None)),
        "epoch": 100,
        "accuracy": np.float64(81.5),
        "step": np.int64(7),
    }
    torch.save(data, tmp_path / "some.pth", _use_new_zipfile_serialization=zipped)
    checkpoint = open_checkpoint(tmp_path / "some.pth")
    assert checkpoint.container == "torch"
    assert checkpoint.names == ("model.module.x", "model.module.y", "optimizer.state.0.exp_avg")
    assert torch.equal(checkpoint.read("model.module.x"), TENSORS["a/kernel"])
    assert checkpoint.read("model.module.y").is_contiguous()
    assert checkpoint.values["args.arch"] == "vit_small"
    assert checkpoint.values["args.nested.a"] is None
    assert checkpoint.values["optimizer.param_groups.0.lr"] == 0.1
    assert (checkpoint.values["epoch"], checkpoint.values["accuracy"], checkpoint.values["step"]) == (100, 81.5, 7)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    trap = {"model": {"x": torch.ones(2)}, "args": Trap(tmp_path / "sprung")}
    torch.save(trap, tmp_path / "trap.pth", _use_new_zipfile_serialization=zipped)
    refusal(tmp_path / "trap.pth", "holds a pickled (posix|nt).system, and unpickling that can run any code")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Trap(tmp_path / "sprung"), protocol=2))
    refusal(tmp_path / "plain.pth", "damaged|unpickling that can run")
    assert not (tmp_path / "sprung").exists()


def test_a_whole_pickled_model_is_refused_by_its_name(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "whole.pth")
    refusal(tmp_path / "whole.pth", r"torch\.nn\.modules\.linear\.Linear.*state_dict\(\) alone")


def test_a_torchscript_program_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "script.pt", "w") as archive:
        for name in ("data.pkl", "constants.pkl", "code/model.py"):
            archive.writestr(f"model/{name}", b"x")
    refusal(tmp_path / "script.pt", "TorchScript program")


def test_damaged_torch_files_are_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "some.pth"
    torch.save({"x": torch.arange(10_000.0), "y": torch.arange(10.0)}, file)
    content = file.read_bytes()
    for length in (5, 200, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        refusal(file, "cut short|damaged|is no .npz")
    file.write_bytes(content)
    flipped(file, len(content) // 2)
    refusal(file, r"is damaged at .*data/0 \(its checksum is wrong\)")
    torch.save({"x": torch.ones(3)}, file, _use_new_zipfile_serialization=False)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) - 4])
    refusal(file, "damaged at its table of contents")


def test_a_torch_file_without_checksums_is_read(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.arange(1000.0)}, tmp_path / "some.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(open_checkpoint(tmp_path / "some.pth").read("x"), torch.arange(1000.0))


def test_torch_files_that_would_grow_are_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.ones(1).expand(100_000, 100_000)}, tmp_path / "views.pth")
    refusal(tmp_path / "views.pth", "damaged at x .*larger than the file")
    torch.save({"x": torch.ones(5)}, tmp_path / "some.pth")
    with (
        zipfile.ZipFile(tmp_path / "some.pth") as archive,
        zipfile.ZipFile(tmp_path / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    refusal(tmp_path / "deflated.pth", "compressed zip archive, which torch never writes")
    endless: dict[str, object] = {"x": torch.ones(1)}
    endless["self"] = endless
    torch.save(endless, tmp_path / "endless.pth")
    refusal(tmp_path / "endless.pth", "nests its contents without end")
    torch.save({"x": torch.ones(3, 3).to_sparse()}, tmp_path / "sparse.pth")
    refusal(tmp_path / "sparse.pth", "it is sparse")
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, tmp_path / "twice.pth")
    refusal(tmp_path / "twice.pth", r"holds a\.b twice")


# Numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_none_are_named(tmp_path: Path, dtype: torch.dtype, value: float) -> None:
    bad = torch.ones(10, dtype=dtype)
    bad[3] = value
    save_file({"good": torch.ones(2), "bad": bad}, tmp_path / "some.safetensors")
    refusal(tmp_path / "some.safetensors", "holds bad with 1 of 10 numbers NaN or infinite")


def test_large_numbers_whose_sum_is_infinite_are_numbers(tmp_path: Path) -> None:
    save_file({"x": torch.full((100,), 3e38), "y": torch.full((9,), 6e4).half()}, tmp_path / "some.safetensors")
    everything(open_checkpoint(tmp_path / "some.safetensors"))


# Files and folders


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5"),
        (b"GGUF" + bytes(100), "a GGUF file"),
        (b"\x08\x08\x12\x07pytorch" + bytes(100), "an ONNX graph"),
        (b"\x93NUMPY\x01\x00" + bytes(100), "a single NumPy array"),
        (b"\x1f\x8b\x08" + bytes(100), "a compressed archive"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), r"is no \.npz, \.safetensors or torch file"),
        (b"", "is empty"),
        (b"x", r"is no \.npz"),
    ],
)
def test_foreign_files_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "weights.bin").write_bytes(content)
    refusal(tmp_path / "weights.bin", message)


def test_the_suffix_does_not_matter(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    (tmp_path / "a.npz").rename(tmp_path / "weights.pth")
    assert open_checkpoint(tmp_path / "weights.pth").container == "npz"


def test_a_folder_with_its_config(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    (tmp_path / "preprocessor_config.json").write_text('{"size": 224}')
    for path in (tmp_path, tmp_path / "model.safetensors"):
        checkpoint = open_checkpoint(path)
        assert checkpoint.path == path
        assert checkpoint.config == {"model_type": "vit"}
        assert checkpoint.preprocessor == {"size": 224}
    # A neighbour's config is nobody else's.
    save_file({"x": torch.ones(2)}, tmp_path / "another.safetensors")
    assert open_checkpoint(tmp_path / "another.safetensors").config is None
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read as JSON"):
        _ = open_checkpoint(tmp_path).config
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"config\.json is no JSON table"):
        _ = open_checkpoint(tmp_path).config


def test_folders_with_none_or_too_many(tmp_path: Path) -> None:
    refusal(tmp_path, "holds no checkpoint and no model.safetensors")
    np.savez(tmp_path / "one.npz", x=np.ones(3))
    assert open_checkpoint(tmp_path).names == ("x",)
    np.savez(tmp_path / "two.npz", x=np.ones(3))
    refusal(tmp_path, r"holds 2 checkpoints \(one\.npz, two\.npz\)")
    refusal(tmp_path / "three.npz", "there is no checkpoint .*three.npz: check the path")


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file({"a": torch.ones(2)}, tmp_path / names[0])
    save_file({"b": torch.zeros(3)}, tmp_path / names[1])
    index = {"metadata": {}, "weight_map": {"a": names[0], "b": names[1]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.names == ("a", "b")
    assert [file.name for file in checkpoint.files] == list(names)
    both = (tmp_path / names[0]).read_bytes() + (tmp_path / names[1]).read_bytes()
    assert checkpoint.sha256() == hashlib.sha256(both).hexdigest()
    assert torch.equal(checkpoint.read("b"), torch.zeros(3))
    (tmp_path / names[1]).unlink()
    with pytest.raises(UserError, match=r"names the shard model-00002-of-00002\.safetensors, which is not beside it"):
        open_checkpoint(tmp_path)
    index["weight_map"] = {"a": "../../secret.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="which is not beside it"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="is no index of shards"):
        open_checkpoint(tmp_path)


def test_any_flipped_byte_is_a_sentence_or_a_number(tmp_path: Path) -> None:
    writers: dict[str, Callable[[Path], object]] = {
        "npz": lambda file: np.savez(file.open("wb"), **ARRAYS),
        "compressed": lambda file: np.savez_compressed(file.open("wb"), **ARRAYS),
        "safetensors": lambda file: save_file(TENSORS, file),
        "torch": lambda file: torch.save({"model": TENSORS, "args": argparse.Namespace(a=1)}, file),
        "legacy": lambda file: torch.save(TENSORS, file, _use_new_zipfile_serialization=False),
    }
    for name, write in writers.items():
        file = tmp_path / name
        write(file)
        content = file.read_bytes()
        refused: list[str] = []
        for place in RNG.integers(0, len(content), 60).tolist():
            file.write_bytes(content)
            flipped(file, place)
            try:
                everything(open_checkpoint(file))
            except UserError as error:
                refused.append(str(error))
        assert len(refused) > 5, name
        assert not [sentence for sentence in refused if "\n" in sentence]


# The accounting of keys


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    names = ("net.blocks.0.w", "net.blocks.1.w", "net.head", "net.extra.a", "net.extra.b", "optimizer.m", "optimizer.v")
    torch.save(
        {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)} | {"step": torch.ones(1)}, tmp_path / "x"
    )
    return open_checkpoint(tmp_path / "x")


def test_every_key_is_taken_once_or_skipped_with_a_reason(checkpoint: Checkpoint) -> None:
    keys = Keys(checkpoint, "net.")
    assert "head" in keys
    assert "optimizer.m" not in keys
    assert keys.count("blocks.{}.w") == 2
    assert keys.shape("head", 2) == (2, 3)
    assert keys.take("head", "head.weight", lambda x: x.T).shape == (3, 2)
    assert keys.tensors["head.weight"].is_contiguous()
    assert "head" in keys
    with pytest.raises(ValueError, match="was taken"):
        keys.take("head")
    both = torch.cat([keys.take("blocks.0.w"), keys.take("blocks.1.w")])
    keys.put("blocks", both, "blocks.0.w", "blocks.1.w")
    assert list(keys) == ["extra.a", "extra.b"]
    with pytest.raises(
        UserError, match=r"does not have, net\.extra\.a, net\.extra\.b, optimizer\.m, optimizer\.v, step:"
    ):
        keys.finish()
    keys.skip("nothing*", "not there")
    keys.skip("extra.*", "never used")
    keys.skip_outside("training alone")
    keys.finish()
    assert keys.renamed == {"net.head": "head.weight", "net.blocks.0.w": "blocks", "net.blocks.1.w": "blocks"}
    assert keys.left_out == {
        "net.extra.*": "never used (2 tensors)",
        "optimizer.*": "training alone (2 tensors)",
        "step": "training alone",
    }


def test_keys_that_do_not_fit_are_named(checkpoint: Checkpoint) -> None:
    keys = Keys(checkpoint, "net.")
    with pytest.raises(UserError, match=r"lacks the tensor net\.pos"):
        keys.take("pos")
    with pytest.raises(UserError, match=r"holds net\.head of shape \(2, 3\), where 3 axes were expected"):
        keys.shape("head", 3)
    with pytest.raises(UserError, match=r"holds net\.head of shape \(2, 3\), which does not fit the other tensors"):
        keys.take("head", "head", lambda x: x.reshape(4, 4))
