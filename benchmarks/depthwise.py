"""Forward and backward pass of depthwise convolutions of PyTorch, beside those that replace them on a CPU.

    OMP_NUM_THREADS=1 python benchmarks/depthwise.py [--rounds 15]

Layers of MobileNetV2, EfficientNet-Lite0 and ConvNeXt, batch 32, channels_last. Both take turns; processor
milliseconds, medians without the first two rounds.
"""

import argparse
import copy
import statistics
import time

import torch
from torch import nn

from mdistiller.training.convolutions import replace_slow_convolutions

# (channels, kernel, stride, size of the input)
LAYERS = (
    *((96, 3, 2, 48), (144, 3, 2, 24), (576, 3, 2, 6), (480, 3, 1, 2)),
    *((144, 5, 2, 24), (240, 5, 1, 12), (672, 5, 1, 6)),
    *((672, 5, 2, 6), (1152, 5, 1, 3), (192, 7, 1, 12)),
)


def measure(layer: tuple[int, ...], precision: torch.dtype, rounds: int) -> list[float]:
    """Returns the milliseconds of PyTorch's convolution and of its replacement."""
    channels, kernel, stride, size = layer
    plain = nn.Conv2d(channels, channels, kernel, stride, kernel // 2, groups=channels, bias=False)
    plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    changed = nn.Sequential(copy.deepcopy(plain))
    replace_slow_convolutions(changed, precision)
    x = torch.randn(32, channels, size, size, dtype=precision).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    grad = None
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for module, found in zip((plain, changed), times, strict=True):
            start = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
                y = module(x)
            grad = torch.randn_like(y) if grad is None else grad
            y.backward(grad)
            found.append(1000 * (time.process_time() - start))
    return [statistics.median(found[2:]) for found in times]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    print("| channels, kernel, stride, size | float32 | replaced | bfloat16 | replaced |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for layer in LAYERS:
        times = [ms for p in (torch.float32, torch.bfloat16) for ms in measure(layer, p, rounds)]
        name = ", ".join(map(str, layer))
        print(f"| {name} | {' | '.join(f'{ms:.1f}' for ms in times)} |", flush=True)


if __name__ == "__main__":
    main()
