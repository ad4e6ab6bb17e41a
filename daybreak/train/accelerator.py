"""The device that a process computes on, and how: one way for training, drawing and measuring.

On a GPU what is float32 is multiplied in TF32, which has more bits than bfloat16 and is ten times
as fast as float32, and a convolution repeats another's bits.
"""

from collections.abc import Callable

import torch
from torch import Tensor


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


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Send a tensor to the processor's memory, behind what its device has to do now.

    What is returned waits until it is there, and not for what the device was given to do since.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    there = tensor.to("cpu", non_blocking=True)  # in pinned memory
    sent = torch.cuda.current_stream(tensor.device).record_event()

    def arrived() -> Tensor:
        sent.synchronize()
        return there

    return arrived
