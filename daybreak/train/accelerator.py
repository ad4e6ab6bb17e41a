"""The device that a process computes on, and how: one way for training, drawing and measuring.

On a GPU what is float32 is multiplied in TF32, which has more bits than bfloat16 and is ten times
as fast as float32, and a convolution repeats another's bits.
"""

import torch


def choose(number: int | None = None) -> torch.device:
    """Return the GPU of this number, or the usual one, set up; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.set_float32_matmul_precision("high")
    if number is None:
        return torch.device("cuda")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)
