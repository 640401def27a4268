"""What models are made of. Importing this room makes every part known to `spec`."""

from polyformer.parts.attention import Attention, CrossAttention, Heads
from polyformer.parts.dropout import Dropout
from polyformer.parts.embeddings import Add, Concatenate, Embed, Gate, TokenEmbedding
from polyformer.parts.feedforward import FeedForward
from polyformer.parts.flow import Flow, Trace
from polyformer.parts.heads import LMHead
from polyformer.parts.kernels.softmax import Softmax
from polyformer.parts.linear import Linear
from polyformer.parts.model import Memory, Output, Tie, Transformer
from polyformer.parts.norms import BatchNorm, LayerNorm, Norm, RMSNorm
from polyformer.parts.part import Part
from polyformer.parts.positions import Learned, Position, Sinusoidal
from polyformer.parts.residual import Chain, Residual
from polyformer.parts.rules import Causal, Everyone, Rule, SameDocument
from polyformer.parts.stack import Stack

__all__ = [
    "Add",
    "Attention",
    "BatchNorm",
    "Causal",
    "Chain",
    "Concatenate",
    "CrossAttention",
    "Dropout",
    "Embed",
    "Everyone",
    "FeedForward",
    "Flow",
    "Gate",
    "Heads",
    "LMHead",
    "LayerNorm",
    "Learned",
    "Linear",
    "Memory",
    "Norm",
    "Output",
    "Part",
    "Position",
    "RMSNorm",
    "Residual",
    "Rule",
    "SameDocument",
    "Sinusoidal",
    "Softmax",
    "Stack",
    "Tie",
    "TokenEmbedding",
    "Trace",
    "Transformer",
]
