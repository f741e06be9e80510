"""The checksums that servers send. hashlib has MD5; Google's storage gives large, composed objects a CRC-32C alone.

A CRC is linear: bytes can be cut into lanes that are worked through side by side, and put together again by what a run of
zero bytes does to a state, which is a 32 x 32 matrix of bits. That makes it fast enough without a compiled library.
"""

import functools
from pathlib import Path

import numpy as np

LANES = 1 << 14
POLYNOMIAL = 0x82F63B78
"""Castagnoli's, bits reversed: RFC 3720, section 12.1."""


def crc32c(file: Path) -> bytes:
    """The CRC-32C of a file's bytes, as 4 bytes, the highest first."""
    state = np.array([0xFFFFFFFF], np.uint32)
    with file.open("rb") as opened:
        while piece := opened.read(LANES << 10):
            state = _through(_zeros(len(piece)), state) ^ _from_nothing(np.frombuffer(piece, np.uint8))
    return (int(state[0]) ^ 0xFFFFFFFF).to_bytes(4, "big")


def _from_nothing(piece: np.ndarray) -> np.ndarray:
    """The state (1,) after `piece` from the state 0, which zero bytes in front do not change."""
    length = -(-len(piece) // LANES)
    lanes = np.concatenate([np.zeros(LANES * length - len(piece), np.uint8), piece]).reshape(LANES, length)
    states = np.zeros(LANES, np.uint32)
    for column in np.ascontiguousarray(lanes.T):
        states = _table()[(states ^ column) & 0xFF] ^ (states >> np.uint32(8))
    while len(states) > 1:
        states = _through(_zeros(length), states[::2]) ^ states[1::2]
        length *= 2
    return states


@functools.cache
def _table() -> np.ndarray:
    """(256,) what one byte makes of a state."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> np.uint32(1)) ^ np.uint32(POLYNOMIAL), table >> np.uint32(1))
    return table


@functools.lru_cache(maxsize=64)
def _zeros(count: int) -> np.ndarray:
    """(32,) what `count` zero bytes make of each bit of a state."""
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
    if count == 0:
        return bits
    if count % 2:
        return _through(_table()[bits & 0xFF] ^ (bits >> np.uint32(8)), _zeros(count - 1))
    half = _zeros(count // 2)
    return _through(half, half)


def _through(matrix: np.ndarray, states: np.ndarray) -> np.ndarray:
    """States (n,) through a matrix of bits."""
    out = np.zeros_like(states)
    for bit in range(32):
        out ^= np.where((states >> np.uint32(bit)) & np.uint32(1), matrix[bit], np.uint32(0))
    return out
