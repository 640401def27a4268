"""Parts of a model exchanged for others, its tensors carried over, and how far its answers drift by that."""

from polyformer.swap.changes import (
    Conversion,
    GroupHeads,
    KeepBlocks,
    LimitWindow,
    Retain,
    SwapKernel,
    TieHead,
)
from polyformer.swap.drift import Difference, Drift, batches_of, drift
from polyformer.swap.fuse import FuseProjections
from polyformer.swap.norms import PlaceNorms, SwapNorms
from polyformer.swap.origins import Moves, origins
from polyformer.swap.positions import SwapPosition
from polyformer.swap.report import Entry, Fate, Report
from polyformer.swap.residuals import SwapResiduals
from polyformer.swap.swap import Swap, Swaps
from polyformer.swap.transplant import transplant

__all__ = [
    "Conversion",
    "Difference",
    "Drift",
    "Entry",
    "Fate",
    "FuseProjections",
    "GroupHeads",
    "KeepBlocks",
    "LimitWindow",
    "Moves",
    "PlaceNorms",
    "Report",
    "Retain",
    "Swap",
    "SwapKernel",
    "SwapNorms",
    "SwapPosition",
    "SwapResiduals",
    "Swaps",
    "TieHead",
    "batches_of",
    "drift",
    "origins",
    "transplant",
]
