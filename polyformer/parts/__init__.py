"""What models are made of. Importing this room makes every part known to `spec`."""

from polyformer.parts.adapters import IA3, Adapted, Adapter, AfterPrefix, DoRA, LoRA, Whole
from polyformer.parts.attention import Attention, CrossAttention, Heads, PerHead
from polyformer.parts.audio import Frames, MaskedSpans
from polyformer.parts.blocks import Beyond, BlockWindow, Edges, InTraining, Marked, RandomBlocks
from polyformer.parts.chunked import Chunked
from polyformer.parts.contract import CLAUSES, Clause, Differs, Refuses, Within, contract_of
from polyformer.parts.convolution import ChannelNorm, Convolution, GatedConvolution
from polyformer.parts.dropout import Dropout, DropPath
from polyformer.parts.embeddings import Add, Concatenate, Embed, Gate, Lookup, TokenEmbedding
from polyformer.parts.experts import Experts, Gated, RouterLosses, Routing, routing_loss, routing_trace
from polyformer.parts.feedforward import FeedForward
from polyformer.parts.flow import Flow, Trace
from polyformer.parts.gating import SpatialGating
from polyformer.parts.globals import Before, FirstToken, GlobalAttention, NoToken
from polyformer.parts.halves import BehindFirst, Halves
from polyformer.parts.hashing import Hashes, Hashing
from polyformer.parts.heads import LMHead
from polyformer.parts.idle import Idle
from polyformer.parts.inputs import Delay, Given, InputPart
from polyformer.parts.kernels.aft import AttentionFree
from polyformer.parts.kernels.blocksparse import BlockSparse
from polyformer.parts.kernels.capped import Capped
from polyformer.parts.kernels.chunks import Chunks
from polyformer.parts.kernels.features import LinearAttention, Performer
from polyformer.parts.kernels.flex import Flex
from polyformer.parts.kernels.kernel import Context, Kernel
from polyformer.parts.kernels.local import Local
from polyformer.parts.kernels.lowrank import Linformer
from polyformer.parts.kernels.sliding import Sliding
from polyformer.parts.kernels.softmax import Softmax
from polyformer.parts.kernels.tiled import Tiled
from polyformer.parts.linear import Affine, Linear
from polyformer.parts.model import Memory, Output, Tie, Transformer
from polyformer.parts.norms import BatchNorm, LayerNorm, Norm, PowerNorm, RMSNorm
from polyformer.parts.part import Part
from polyformer.parts.passages import Fused, Passages
from polyformer.parts.pooling import (
    Activate,
    Clip,
    Last,
    LastOf,
    Max,
    Mean,
    MeanOfHeads,
    Normalise,
    Nth,
    Pool,
    Scale,
    Squeeze,
)
from polyformer.parts.positions import Axial, Learned, Position, Sinusoidal, Table
from polyformer.parts.prefix import MadePrefix, Prefix, Prompt
from polyformer.parts.relative import Alibi, Buckets, RelativePosition, Shaw, TransformerXL, Turned
from polyformer.parts.repeats import Repeats
from polyformer.parts.residual import Branches, Chain, Identity, Residual
from polyformer.parts.retention import Retention
from polyformer.parts.reversible import Coupling, Reversible
from polyformer.parts.rotary import Dynamic, Interpolated, Llama3, Rotary, Scaling, Yarn
from polyformer.parts.rules import Causal, Either, Everyone, Nobody, Rule, SameDocument, Window
from polyformer.parts.stack import Pyramid, Repeat, Stack
from polyformer.parts.vision import GridPositions, Patches, Token
from polyformer.parts.windows import GridBias, PatchMerging, Windows

__all__ = [
    "CLAUSES",
    "IA3",
    "Activate",
    "Adapted",
    "Adapter",
    "Add",
    "Affine",
    "AfterPrefix",
    "Alibi",
    "Attention",
    "AttentionFree",
    "Axial",
    "BatchNorm",
    "Before",
    "BehindFirst",
    "Beyond",
    "BlockSparse",
    "BlockWindow",
    "Branches",
    "Buckets",
    "Capped",
    "Causal",
    "Chain",
    "ChannelNorm",
    "Chunked",
    "Chunks",
    "Clause",
    "Clip",
    "Concatenate",
    "Context",
    "Convolution",
    "Coupling",
    "CrossAttention",
    "Delay",
    "Differs",
    "DoRA",
    "DropPath",
    "Dropout",
    "Dynamic",
    "Edges",
    "Either",
    "Embed",
    "Everyone",
    "Experts",
    "FeedForward",
    "FirstToken",
    "Flex",
    "Flow",
    "Frames",
    "Fused",
    "Gate",
    "Gated",
    "GatedConvolution",
    "Given",
    "GlobalAttention",
    "GridBias",
    "GridPositions",
    "Halves",
    "Hashes",
    "Hashing",
    "Heads",
    "Identity",
    "Idle",
    "InTraining",
    "InputPart",
    "Interpolated",
    "Kernel",
    "LMHead",
    "Last",
    "LastOf",
    "LayerNorm",
    "Learned",
    "Linear",
    "LinearAttention",
    "Linformer",
    "Llama3",
    "LoRA",
    "Local",
    "Lookup",
    "MadePrefix",
    "Marked",
    "MaskedSpans",
    "Max",
    "Mean",
    "MeanOfHeads",
    "Memory",
    "NoToken",
    "Nobody",
    "Norm",
    "Normalise",
    "Nth",
    "Output",
    "Part",
    "Passages",
    "PatchMerging",
    "Patches",
    "PerHead",
    "Performer",
    "Pool",
    "Position",
    "PowerNorm",
    "Prefix",
    "Prompt",
    "Pyramid",
    "RMSNorm",
    "RandomBlocks",
    "Refuses",
    "RelativePosition",
    "Repeat",
    "Repeats",
    "Residual",
    "Retention",
    "Reversible",
    "Rotary",
    "RouterLosses",
    "Routing",
    "Rule",
    "SameDocument",
    "Scale",
    "Scaling",
    "Shaw",
    "Sinusoidal",
    "Sliding",
    "Softmax",
    "SpatialGating",
    "Squeeze",
    "Stack",
    "Table",
    "Tie",
    "Tiled",
    "Token",
    "TokenEmbedding",
    "Trace",
    "Transformer",
    "TransformerXL",
    "Turned",
    "Whole",
    "Window",
    "Windows",
    "Within",
    "Yarn",
    "contract_of",
    "routing_loss",
    "routing_trace",
]
