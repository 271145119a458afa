"""The shape of a packed weight; csrc/core/pack.h says what lies where."""

PANEL, GROUP = 64, 4  # output columns and input channels of one block


def packed_shape(n: int, k: int, e: int = 0) -> tuple[int, int, int, int]:
    """Of n outputs, k inputs and e tail columns: panels, blocks of each with the one of sums, columns, channels."""
    return -(-n // PANEL), -(-k // GROUP) + -(-e // GROUP) + 1, PANEL, GROUP
