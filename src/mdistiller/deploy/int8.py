"""Static quantization of an ONNX graph to eight bits."""

import logging
from pathlib import Path

from torch import Tensor

CALIBRATION_IMAGES = 200
_BATCH = 25


def quantize(source: Path, target: Path, images: Tensor) -> None:
    """Writes a graph whose weights and activations have eight bits, calibrated on prepared images.

    Pairs of QuantizeLinear and DequantizeLinear surround each operation. Activations are uint8 with one scale
    per tensor, whose range is that of the calibration images. Weights are symmetric int8 from -64 to 64 with
    one scale per output channel: x86 CPUs without VNNI add two products in 16 bits, which larger weights
    overflow. On x86, ONNX Runtime computes faster with uint8 and int8 than with int8 alone.

    Args:
        source: the float32 graph, with the input `image`.
        target: the file to write.
        images: float32 [N, 3, S, S], prepared as for the model.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        batches = iter(images.split(_BATCH))

        def get_next(self) -> dict[str, object] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"image": batch.numpy()}

    before = logging.root.manager.disable
    # Not ONNX Runtime's advice to pre-process: torch's exporter has fused and typed the graph.
    logging.disable(max(before, logging.WARNING))
    try:
        quantize_static(
            source,
            target,
            Reader(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    finally:
        logging.disable(before)
