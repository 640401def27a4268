"""What a model does inside: so far, where its attention looks."""

from polyformer.explain.attention import AttentionMap, Explained, explain_attention
from polyformer.explain.picture import Picture, attention_picture, draw_attention

__all__ = ["AttentionMap", "Explained", "Picture", "attention_picture", "draw_attention", "explain_attention"]
