"""PNG without compression: the same bytes whatever zlib is installed, and quick to read back.

Compressed PNG differs between zlib and zlib-ng and between their versions; the fingerprints of
packed sets hash file contents and must not. Specification: W3C PNG (third edition), sec. 5 and 11.
"""

from __future__ import annotations

import struct
import zlib

import numpy as np

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BLOCK = 65535


def encode_png(pixels: np.ndarray) -> bytes:
    """A lossless PNG of uint8 [H, W, 3]."""
    height, width, channels = pixels.shape
    assert channels == 3 and pixels.dtype == np.uint8, (pixels.shape, pixels.dtype)
    rows = np.zeros((height, width * 3 + 1), dtype=np.uint8)  # each row opens with filter 0
    rows[:, 1:] = pixels.reshape(height, -1)
    raw = rows.tobytes()
    stream = [b"\x78\x01"]
    for first in range(0, len(raw), _BLOCK):
        part = raw[first : first + _BLOCK]
        is_last = first + _BLOCK >= len(raw)
        stream += [struct.pack("<BHH", is_last, len(part), len(part) ^ 0xFFFF), part]
    stream.append(struct.pack(">I", zlib.adler32(raw)))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"".join(
        [
            _SIGNATURE,
            _chunk(b"IHDR", header),
            _chunk(b"IDAT", b"".join(stream)),
            _chunk(b"IEND", b""),
        ]
    )


def _chunk(kind: bytes, content: bytes) -> bytes:
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)
