"""CRC-32C, Castagnoli's checksum: of TFRecord's records, and of the large files that Google's storage sends.

No compiled library is needed. A table for each distance to the end of a block turns a CRC into lookups that NumPy does
4096 at a time: 0.1 ms for 10 kB, where one byte after another would take 3 ms, and 100 to 190 MB/s.
"""

import functools
from pathlib import Path

import numpy as np
from jaxtyping import Int, UInt8

POLYNOMIAL = 0x82F63B78
"""Castagnoli's, bits reversed: RFC 3720, section 12.1."""
BLOCK = 4096


def crc32c(data: bytes) -> int:
    """Of some bytes."""
    return int(crc32c_of_rows(np.frombuffer(data, np.uint8)[None])[0])


def crc32c_of_file(file: Path) -> bytes:
    """Of a file's bytes, as 4 bytes, the highest first, as servers send it."""
    state = np.array([0xFFFFFFFF], np.int64)
    with file.open("rb") as opened:
        while piece := opened.read(BLOCK << 8):
            state = _through(state, np.frombuffer(piece, np.uint8)[None])
    return (int(state[0]) ^ 0xFFFFFFFF).to_bytes(4, "big")


def crc32c_of_rows(rows: UInt8[np.ndarray, "n length"]) -> Int[np.ndarray, "n"]:
    """Of each row."""
    return _through(np.full(rows.shape[0], 0xFFFFFFFF, np.int64), rows) ^ 0xFFFFFFFF


def _through(state: Int[np.ndarray, "n"], rows: UInt8[np.ndarray, "n length"]) -> Int[np.ndarray, "n"]:
    """What each row makes of its state."""
    for first in range(0, rows.shape[1], BLOCK):
        block = rows[:, first : first + BLOCK]
        # The state enters as if it were mixed into the next four bytes; of fewer, the rest of it is only shifted.
        head = min(4, block.shape[1])
        into = state[:, None] >> (8 * np.arange(4)) & 0xFF
        mixed = np.concatenate([block[:, :head] ^ into[:, :head].astype(np.uint8), block[:, head:]], axis=1)
        place = mixed + np.arange(256 * (block.shape[1] - 1), -1, -256, dtype=np.int32)
        state = (state >> 8 * head) ^ np.bitwise_xor.reduce(_tables().take(place), axis=1).astype(np.int64)
    return state


@functools.cache
def _tables() -> np.ndarray:
    """(BLOCK, 256) what each byte comes to when so many zero bytes follow it."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> np.uint32(1)) ^ np.uint32(POLYNOMIAL), table >> np.uint32(1))
    tables = [table]
    for _ in range(BLOCK - 1):
        tables.append(table[tables[-1] & 0xFF] ^ (tables[-1] >> np.uint32(8)))
    return np.stack(tables)
