"""The formats in which ggml stores weights: small whole numbers in blocks with a scale, or ordinary numbers.

A block holds 32 or 256 weights. In the plain quantisations (Q4_0 to Q8_0) it has one scale, and perhaps an offset; in
the K-quantisations it is cut into 8 or 16 groups whose scales are again small whole numbers, times one scale of the
block. How they become tensors is said in `dequantise.py`. Nothing here needs PyTorch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Format:
    """One of ggml's types: its number in a file, and the weights and the bytes of a block.

    `plain` is what PyTorch calls the numbers of the formats which hold ordinary ones.
    """

    name: str
    code: int
    weights: int
    bytes: int
    plain: str | None = None

    def size(self, shape: tuple[int, ...]) -> int | None:
        """Return the bytes of a tensor, or None if its rows are not made of whole blocks."""
        row = shape[-1] if shape else 1
        return None if row % self.weights else math.prod(shape) // self.weights * self.bytes


_ALL = (
    Format("F32", 0, 1, 4, "float32"),
    Format("F16", 1, 1, 2, "float16"),
    Format("BF16", 30, 1, 2, "bfloat16"),
    Format("F64", 28, 1, 8, "float64"),
    Format("I8", 24, 1, 1, "int8"),
    Format("I16", 25, 1, 2, "int16"),
    Format("I32", 26, 1, 4, "int32"),
    Format("I64", 27, 1, 8, "int64"),
    Format("Q4_0", 2, 32, 18),
    Format("Q4_1", 3, 32, 20),
    Format("Q5_0", 6, 32, 22),
    Format("Q5_1", 7, 32, 24),
    Format("Q8_0", 8, 32, 34),
    Format("Q2_K", 10, 256, 84),
    Format("Q3_K", 11, 256, 110),
    Format("Q4_K", 12, 256, 144),
    Format("Q5_K", 13, 256, 176),
    Format("Q6_K", 14, 256, 210),
    Format("IQ2_XXS", 16, 256, 66),
    Format("IQ2_XS", 17, 256, 74),
    Format("IQ3_XXS", 18, 256, 98),
    Format("IQ1_S", 19, 256, 50),
    Format("IQ4_NL", 20, 32, 18),
    Format("IQ3_S", 21, 256, 110),
    Format("IQ2_S", 22, 256, 82),
    Format("IQ4_XS", 23, 256, 136),
    Format("IQ1_M", 29, 256, 56),
    Format("TQ1_0", 34, 256, 54),
    Format("TQ2_0", 35, 256, 66),
    Format("MXFP4", 39, 32, 17),
    Format("NVFP4", 40, 64, 36),
)

FORMATS = {kind.code: kind for kind in _ALL}
"""All formats by their number in a file. A new one is a new row above."""
