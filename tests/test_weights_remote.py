"""Ids are fetched once, whole and right, from servers on loopback that stand in for Google's storage and the hub."""

import base64
import hashlib
import json
import re
import shutil
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from vitrail.commands import models
from vitrail.core.checksums import crc32c_of_file
from vitrail.core.errors import UserError
from vitrail.weights import storage
from vitrail.weights.load import load
from vitrail.weights.remote import cached, fetch

FIXTURES = Path(__file__).parent / "fixtures"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Server:
    """files: by path. hashes: which checksums are sent. cuts: after how many bytes each next answer breaks off."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    hashes: tuple[str, ...] = ("crc32c", "md5")
    wrong_hash: bool = False
    cuts: list[int] = field(default_factory=list)
    status: int = 200
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)


def etag(content: bytes) -> str:
    return f'"{hashlib.sha1(content).hexdigest()}"'


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(with_body=False)

        def do_GET(self) -> None:
            self.answer(with_body=True)

        def answer(self, with_body: bool) -> None:
            wanted = self.headers.get("Range")
            state.asked.append((self.command, self.path, wanted))
            on_hub = "/resolve/" in self.path
            path = re.sub(r"/resolve/[^/]+/", "/", self.path)
            content = state.files.get(path)
            listed = re.fullmatch(r"/api/models/(\w+/\w+)(/revision/\w+)?", self.path)
            if listed:
                on_hub, names = True, [name for name in state.files if name.startswith(f"/{listed[1]}/")]
                siblings = [{"rfilename": name.rsplit("/", 1)[1]} for name in names]
                about = {"id": listed[1], "modelId": listed[1], "sha": COMMIT, "siblings": siblings}
                content = json.dumps(about).encode() if names else None
            if state.status != 200 or content is None:
                self.send_response(404 if state.status == 200 else state.status)
                if on_hub and state.status == 200:
                    self.send_header("X-Repo-Commit", COMMIT)
                    self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            start = 0
            if wanted and self.headers.get("If-Range", etag(content)) == etag(content):
                start = int(wanted.removeprefix("bytes=").split("-")[0])
            if start >= len(content) > 0:
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if on_hub:
                self.send_header("X-Repo-Commit", COMMIT)
                digest = hashlib.sha256(b"other" if state.wrong_hash else content).hexdigest()
                self.send_header("X-Linked-Etag", f'"{digest}"')
                self.send_header("X-Linked-Size", str(len(content)))
            self.send_header("ETag", etag(content))
            if "md5" in state.hashes:
                digest = hashlib.md5(b"other" if state.wrong_hash else content).digest()
                self.send_header("x-goog-hash", "md5=" + base64.b64encode(digest).decode())
            if "crc32c" in state.hashes:
                (tmp_path / "plain").write_bytes(b"other" if state.wrong_hash else content)
                self.send_header(
                    "x-goog-hash", "crc32c=" + base64.b64encode(crc32c_of_file(tmp_path / "plain")).decode()
                )
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            if with_body:
                cut = state.cuts.pop(0) if state.cuts else None
                self.wfile.write(content[start:] if cut is None else content[start : start + cut])
                if cut is not None:
                    self.close_connection = True

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    state.address = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.setattr(storage, "PAUSE", 0.01)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield state
    running.shutdown()
    running.server_close()


def content(size: int = 1_000_000) -> bytes:
    return np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8).tobytes()


PLAIN = "/vit_models/imagenet21k/ViT-B_16.npz"


def test_crc32c_of_known_bytes(tmp_path: Path) -> None:
    # RFC 3720, B.4, and the check value of every catalogue
    for data, expected in (
        (bytes(32), "8a9136aa"),
        (b"\xff" * 32, "62a8ab43"),
        (b"123456789", "e3069283"),
        (b"", "00000000"),
    ):
        (tmp_path / "data").write_bytes(data)
        assert crc32c_of_file(tmp_path / "data").hex() == expected


def test_crc32c_of_many_bytes_is_that_of_the_byte_by_byte_rule(tmp_path: Path) -> None:
    data = content(300_001)
    state = 0xFFFFFFFF
    for byte in data:
        state ^= byte
        for _ in range(8):
            state = (state >> 1) ^ (0x82F63B78 if state & 1 else 0)
    (tmp_path / "data").write_bytes(data)
    assert int.from_bytes(crc32c_of_file(tmp_path / "data"), "big") == state ^ 0xFFFFFFFF


@pytest.mark.parametrize("hashes", [("crc32c", "md5"), ("crc32c",), ()])
def test_an_official_file_is_fetched_once_checked_and_recorded(
    server: Server, tmp_path: Path, hashes: tuple[str, ...]
) -> None:
    server.files[PLAIN], server.hashes = content(), hashes
    said: list[tuple[str, int, int]] = []
    file = fetch(
        "official:imagenet21k/ViT-B_16",
        base=server.address,
        cache=tmp_path / "c",
        progress=lambda *now: said.append(now),
    )
    assert file == tmp_path / "c" / "vit_models" / "imagenet21k" / "ViT-B_16.npz"
    assert file.read_bytes() == content()
    assert said[-1] == ("ViT-B_16.npz", 1_000_000, 1_000_000)
    record = json.loads((file.parent / "ViT-B_16.npz.json").read_text())
    assert record["sha256"] == hashlib.sha256(content()).hexdigest()
    assert record["url"] == server.address + PLAIN
    assert {path.name for path in file.parent.iterdir()} == {
        "ViT-B_16.npz",
        "ViT-B_16.npz.json",
        "ViT-B_16.npz.lock",
    }
    assert fetch("official:imagenet21k/ViT-B_16.npz", base=server.address, cache=tmp_path / "c") == file
    assert len(server.asked) == 1


def test_a_cut_connection_goes_on_where_it_ended(server: Server, tmp_path: Path) -> None:
    server.files[PLAIN] = content()
    server.cuts = [300_000, 0, 250_000]
    file = fetch("official:imagenet21k/ViT-B_16", base=server.address, cache=tmp_path)
    assert file.read_bytes() == content()
    assert [wanted for _, _, wanted in server.asked] == [None, "bytes=300000-", "bytes=300000-", "bytes=550000-"]


def test_a_download_that_failed_is_taken_up_by_the_next_call(server: Server, tmp_path: Path) -> None:
    server.files[PLAIN] = content()
    server.cuts = [400_000, *[0] * storage.TRIES]
    with pytest.raises(UserError, match=r"was cut 5 times in a row at 400,000 bytes .*: ask again") as raised:
        fetch("official:imagenet21k/ViT-B_16", base=server.address, cache=tmp_path)
    assert "\n" not in str(raised.value)
    file = tmp_path / PLAIN[1:]
    assert not file.exists()
    server.asked.clear()
    assert fetch("official:imagenet21k/ViT-B_16", base=server.address, cache=tmp_path).read_bytes() == content()
    assert server.asked == [("GET", PLAIN, "bytes=400000-")]


def test_two_versions_of_a_file_are_never_joined(server: Server, tmp_path: Path) -> None:
    server.files[PLAIN] = bytes(1_000_000)
    server.cuts = [400_000, *[0] * storage.TRIES]
    with pytest.raises(UserError):
        fetch("official:imagenet21k/ViT-B_16", base=server.address, cache=tmp_path)
    server.files[PLAIN] = content()
    assert fetch("official:imagenet21k/ViT-B_16", base=server.address, cache=tmp_path).read_bytes() == content()
    # A part longer than the server's file is of another one too.
    file = tmp_path / PLAIN[1:]
    file.unlink()
    (file.parent / (file.name + ".part")).write_bytes(bytes(2_000_000))
    (file.parent / (file.name + ".part.json")).write_text(json.dumps({"etag": etag(content())}))
    assert fetch("official:imagenet21k/ViT-B_16", base=server.address, cache=tmp_path).read_bytes() == content()


@pytest.mark.parametrize(("hashes", "kind"), [(("crc32c", "md5"), "md5"), (("crc32c",), "crc32c")])
def test_what_came_damaged_is_not_kept(server: Server, tmp_path: Path, hashes: tuple[str, ...], kind: str) -> None:
    server.files[PLAIN], server.hashes, server.wrong_hash = content(), hashes, True
    with pytest.raises(UserError, match=f"came damaged: its {kind} is .* the copy was deleted: ask again"):
        fetch("official:imagenet21k/ViT-B_16", base=server.address, cache=tmp_path)
    assert not list((tmp_path / "vit_models").rglob("*.npz*")) or {
        path.name for path in (tmp_path / "vit_models" / "imagenet21k").iterdir()
    } <= {"ViT-B_16.npz.lock", "ViT-B_16.npz.part.json"}
    server.wrong_hash = False
    assert fetch("official:imagenet21k/ViT-B_16", base=server.address, cache=tmp_path).read_bytes() == content()


def test_many_at_once_fetch_a_file_once(server: Server, tmp_path: Path) -> None:
    """The lock is the open file's, so threads stand for the processes of one run."""
    server.files[PLAIN] = content(5_000_000)
    with ThreadPoolExecutor(4) as pool:
        ask = partial(fetch, "official:imagenet21k/ViT-B_16", base=server.address, cache=tmp_path)
        found = [one.result() for one in [pool.submit(ask) for _ in range(4)]]
    assert found == [tmp_path / PLAIN[1:]] * 4
    assert found[0].read_bytes() == content(5_000_000)
    assert len(server.asked) == 1


def test_any_file_of_the_buckets_has_an_id(server: Server, tmp_path: Path) -> None:
    long = "augreg/B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
    for source, path in (
        ("official:augreg/B_16", f"/vit_models/{long}.npz"),
        (f"official:{long}", f"/vit_models/{long}.npz"),
        ("official:imagenet21k/R50+ViT-B_16", "/vit_models/imagenet21k/R50%2BViT-B_16.npz"),
        ("official:bit_models/BiT-M-R50x1.npz", "/bit_models/BiT-M-R50x1.npz"),
        ("official:big_vision/vit_s16_i1k_300ep", "/big_vision/vit_s16_i1k_300ep.npz"),
    ):
        server.files[path] = path.encode()
        assert fetch(source, base=server.address, cache=tmp_path).read_bytes() == path.encode()


def test_no_network_is_one_sentence_that_says_what_to_do(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    for source, advice in (
        (
            "official:imagenet21k/ViT-B_16",
            f"give its path, or put it at {tmp_path}/vit_models/imagenet21k/ViT-B_16.npz",
        ),
        ("hf:owner/name", "fetch its folder elsewhere and give its path"),
        ("timm:vit_tiny", "fetch its folder elsewhere and give its path"),
    ):
        with pytest.raises(UserError, match=r"cannot be fetched .*without a network") as raised:
            fetch(source, base=nobody, cache=tmp_path)
        assert advice in str(raised.value)
        assert "\n" not in str(raised.value)


def test_wrong_ids_are_one_sentence(server: Server, tmp_path: Path) -> None:
    for source, message in (
        ("official:imagenet21k/ViT-B_17", r"nearest that is known is official:imagenet21k/ViT-B_16 "),
        ("official:../../etc/passwd", "is no id of Google's storage"),
        ("official:one", "is no id of Google's storage"),
        ("hf:owner", "is no id of the hub"),
        ("hf:owner/name/more", "is no id of the hub"),
        ("hf:nobody/nothing", "there is no hf:nobody/nothing on the hub, or it is private"),
        ("ftp:a/b", "is no id: write hf:owner/name"),
    ):
        with pytest.raises(UserError, match=message) as raised:
            fetch(source, base=server.address, cache=tmp_path)
        assert "\n" not in str(raised.value)
    server.status = 503
    with pytest.raises(UserError, match=r"answers 503 .*: try again later"):
        fetch("official:imagenet21k/ViT-B_16", base=server.address, cache=tmp_path)


def on_hub(server: Server, folder: Path, name: str) -> None:
    for file in folder.iterdir():
        server.files[f"/{name}/{file.name}"] = file.read_bytes()


def test_a_hub_folder_is_fetched_checked_and_kept(server: Server, tmp_path: Path) -> None:
    on_hub(server, FIXTURES / "hf_vit", "timm/tiny")
    folder = fetch("timm:tiny", base=server.address, cache=tmp_path)
    for file in (FIXTURES / "hf_vit").iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()
    got = [path for method, path, _ in server.asked if method == "GET" and "/api/" not in path]
    assert sorted(path.rsplit("/", 1)[1] for path in got) == ["config.json", "model.safetensors"]
    server.asked.clear()
    assert fetch("hf:timm/tiny", base=server.address, cache=tmp_path) == folder
    assert not [path for method, path, _ in server.asked if method == "GET" and "/api/" not in path]
    assert fetch(f"hf:timm/tiny@{COMMIT}", base=server.address, cache=tmp_path) == folder
    server.status = 503
    assert fetch("hf:timm/tiny", base=server.address, cache=tmp_path) == folder


def test_a_hub_file_that_is_not_what_the_hub_states_is_refused(server: Server, tmp_path: Path) -> None:
    on_hub(server, FIXTURES / "hf_vit", "owner/tiny")
    server.wrong_hash = True
    with pytest.raises(UserError, match=r"came damaged: the sha256 of model.safetensors is"):
        fetch("hf:owner/tiny", base=server.address, cache=tmp_path)


def test_a_hub_folder_without_weights_is_refused(server: Server, tmp_path: Path) -> None:
    server.files["/owner/empty/config.json"] = b"{}"
    with pytest.raises(UserError, match=r"has none of model.safetensors"):
        fetch("hf:owner/empty", base=server.address, cache=tmp_path)


def test_shards_come_all(server: Server, tmp_path: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    server.files["/o/n/model.safetensors.index.json"] = json.dumps(index).encode()
    for shard in index["weight_map"].values():
        server.files[f"/o/n/{shard}"] = shard.encode()
    folder = fetch("hf:o/n", base=server.address, cache=tmp_path)
    assert {file.name for file in folder.iterdir()} == {"model.safetensors.index.json", *index["weight_map"].values()}


def test_what_is_in_the_cache_is_found_without_a_server(server: Server, tmp_path: Path) -> None:
    on_hub(server, FIXTURES / "hf_vit", "timm/tiny")
    server.files[PLAIN] = content()
    for source in ("timm:tiny", "official:imagenet21k/ViT-B_16"):
        assert cached(source, cache=tmp_path) is None
        place = fetch(source, base=server.address, cache=tmp_path)
        server.asked.clear()
        assert cached(source, cache=tmp_path) == place
        assert server.asked == []
    with pytest.raises(UserError, match="is no id"):
        cached("elsewhere:tiny", cache=tmp_path)


def test_what_is_in_the_cache_in_part_or_damaged_counts_as_not_there(server: Server, tmp_path: Path) -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = {"weight_map": dict(zip("ab", shards, strict=True))}
    server.files["/o/n/model.safetensors.index.json"] = json.dumps(index).encode()
    for shard in shards:
        server.files[f"/o/n/{shard}"] = shard.encode()
    folder = fetch("hf:o/n", base=server.address, cache=tmp_path)
    assert cached("hf:o/n", cache=tmp_path) == folder
    (folder / shards[1]).unlink()
    assert cached("hf:o/n", cache=tmp_path) is None
    on_hub(server, FIXTURES / "hf_vit", "owner/tiny")
    folder = fetch("hf:owner/tiny", base=server.address, cache=tmp_path)
    shutil.rmtree(tmp_path / "checked")
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(b"x")
    assert cached("hf:owner/tiny", cache=tmp_path) is None


def test_load_takes_an_id_that_is_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"without a network .*HF_HUB_OFFLINE is set"):
        load("official:imagenet21k/tiny")
    place = tmp_path / "vitrail" / "vit_models" / "imagenet21k"
    place.mkdir(parents=True)
    shutil.copy(FIXTURES / "official_token.npz", place / "tiny.npz")
    assert load("official:imagenet21k/tiny", heads=3).report.path == str(place / "tiny.npz")


def test_the_ids_that_are_known(capsys: pytest.CaptureFixture[str]) -> None:
    assert len({known.id for known in storage.KNOWN}) == len(storage.KNOWN) == 35
    assert all(re.fullmatch(r"vit_models/[\w+.-]+/[\w+.-]+\.npz", known.path) for known in storage.KNOWN)
    assert models.run(models.Settings(remote=True, json=True)) == 0
    rows = {row["id"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["official:imagenet21k/ViT-B_16"]["mebibytes"] == 394
    small = rows["official:augreg/S_16"]["url"]
    assert small.endswith("/vit_models/augreg/S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0.npz")
    assert models.run(models.Settings(remote=True)) == 0
    assert "official:augreg/Ti_16" in capsys.readouterr().out
