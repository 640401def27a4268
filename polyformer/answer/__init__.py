"""What a loaded model is asked beside translating and writing: vectors, masked words, labels."""

from polyformer.answer.classify import Label, classify_images, classify_texts
from polyformer.answer.embed import embed_texts
from polyformer.answer.fill import Filled, fill

__all__ = ["Filled", "Label", "classify_images", "classify_texts", "embed_texts", "fill"]
