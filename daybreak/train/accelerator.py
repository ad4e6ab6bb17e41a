"""The device that a process computes on; set up alike for training, drawing and measuring.

On a GPU, float32 matrices are multiplied in TF32, which has more bits than bfloat16 and is ten
times as fast as float32; convolutions are deterministic.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def choose(number: int | None = None) -> torch.device:
    """Set up and return the GPU of this number, or the current one; the CPU if there is no GPU."""
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
    """Queue a copy of a tensor to CPU memory, behind the device's current work.

    The returned function waits for that copy, but not for work queued on the device after it.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    there = tensor.to("cpu", non_blocking=True)  # in pinned memory
    sent = torch.cuda.current_stream(tensor.device).record_event()

    def arrived() -> Tensor:
        sent.synchronize()
        return there

    return arrived
