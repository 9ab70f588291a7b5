"""HPACK's Huffman code: strings of header fields, as other implementations send them.

The code is canonical: lengths alone say it. Source: RFC 7541, appendix B.
"""

from __future__ import annotations

from functools import lru_cache

_LENGTHS = (
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28,
    28, 28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6,
    12, 10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5,
    6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22,
    22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21,
    20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22,
    23, 26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26,
    28, 27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27,
    28, 27, 27, 27, 27, 27, 26,
)  # fmt: skip
"""Bits of each byte's code; that of the end of a string, which none may hold, has 30 as the last ones of them."""


def _rows() -> list[tuple[int, int, bytes]]:
    """Return (bits, first code, bytes in the order of their codes), shorter codes first."""
    rows: list[tuple[int, int, bytes]] = []
    code = last_bits = 0
    for bits in sorted(set(_LENGTHS)):
        code <<= bits - last_bits
        symbols = bytes(byte for byte, length in enumerate(_LENGTHS) if length == bits)
        rows.append((bits, code, symbols))
        code, last_bits = code + len(symbols), bits
    return rows


_ROWS = _rows()


@lru_cache(maxsize=256)
def decode(data: bytes) -> bytes:
    """Return the string that `data` is the code of.

    Raises:
        ValueError: it is none: it ends within a code, or holds the end of a string.
    """
    text = bytearray()
    held = num_held = 0
    for byte in data:
        held, num_held = held << 8 | byte, num_held + 8
        is_found = True
        while is_found:
            is_found = False
            for bits, first, symbols in _ROWS:
                if bits > num_held:
                    break
                index = (held >> (num_held - bits)) - first
                if index < len(symbols):
                    text.append(symbols[index])
                    num_held -= bits
                    held &= (1 << num_held) - 1
                    is_found = True
                    break
        if num_held >= 30:
            raise ValueError("the end of a string within one")
    if num_held > 7 or held != (1 << num_held) - 1:
        raise ValueError("a string that ends within a code")
    return bytes(text)
