"""How the finalize kernel is launched."""

from dataclasses import dataclass

from specprefill_kernels._triton import Target


@dataclass(frozen=True)
class Config:
    """One launch.

    Attributes:
        block: positions of one sequence per program.
        num_warps: warps per program.
    """

    block: int
    num_warps: int


# Four positions a thread are one 16-byte load per row, and the rows are independent loads: enough in flight. 512
# positions a program keep 132 processors busy from 64K tokens on; a smaller block would not fill a warp's load.
DEVICE = Config(block=512, num_warps=4)
# An operation costs the interpreter 50 us whatever its size.
INTERPRETER_SMALL = Config(block=512, num_warps=1)
INTERPRETER = Config(block=16384, num_warps=1)

CONFIGS = (DEVICE,)


def choose(target: Target, capacity: int) -> Config:
    """
    Args:
        capacity: T of the state.
    """
    if target.interpreted:
        return INTERPRETER_SMALL if capacity <= INTERPRETER_SMALL.block else INTERPRETER
    return DEVICE
