"""The shape of a packed weight; csrc/core/pack.h says what lies where."""

PANEL, GROUP = 64, 4  # output columns and input channels of one block
BOUNDED = 1024  # blocks whose bounds, a byte for every four, fill one block


def packed_shape(n: int, k: int, e: int = 0) -> tuple[int, int, int, int]:
    """Of n outputs, k inputs and e tail columns: panels, blocks of each with those of bounds, columns, channels."""
    blocks = -(-k // GROUP) + -(-e // GROUP)
    return -(-n // PANEL), blocks + -(-blocks // BOUNDED), PANEL, GROUP
