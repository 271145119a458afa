"""The shape of a packed weight; csrc/core/pack.h says what lies where."""

PANEL, GROUP = 64, 4  # output columns and input channels of one block
SPAN = 4  # blocks that codes of fewer than 8 bits lie in together
BOUNDED = 1024  # blocks whose bounds, a byte for every four, fill one block
WIDTHS = (2, 4, 6, 8)  # bits that a code may take


def packed_shape(n: int, k: int, e: int = 0, weight_bits: int = 8) -> tuple[int, int, int, int]:
    """Of n outputs, k inputs and e tail columns: panels, blocks of each with those of bounds, columns, channels."""
    base = -(-k // GROUP) if weight_bits == 8 else -(-k // (SPAN * GROUP)) * SPAN
    tail = -(-e // GROUP)
    bounds = -(-(base + tail) // BOUNDED)
    return -(-n // PANEL), base * weight_bits // 8 + tail + bounds, PANEL, GROUP
