"""What parts cost, measured: time and memory over the length of the text, and where a part overtakes another."""

from polyformer.bench.attention import MODES, Cell, Conditions, Curves, Settings, bench_attention
from polyformer.bench.contestants import CONTESTANTS, DENSE, Contestant, chosen
from polyformer.bench.fits import Power, crossing, fit_power, less_from
from polyformer.bench.memory import Memory, memory_of
from polyformer.bench.picture import draw_curves, picture_file
from polyformer.bench.work import HeadSizes

__all__ = [
    "CONTESTANTS",
    "DENSE",
    "MODES",
    "Cell",
    "Conditions",
    "Contestant",
    "Curves",
    "HeadSizes",
    "Memory",
    "Power",
    "Settings",
    "bench_attention",
    "chosen",
    "crossing",
    "draw_curves",
    "fit_power",
    "less_from",
    "memory_of",
    "picture_file",
]
