"""How good a model is: BLEU and chrF of its translations, loss and perplexity on held-out pairs and texts."""

from polyformer.judge.evaluate import Direction, Evaluation, evaluate
from polyformer.judge.held_out import HeldOut, held_out_loss, negative_log_likelihood
from polyformer.judge.scores import Score, bleu, bleu_tokenizer, chrf
from polyformer.judge.texts import Sample, Samples, TextEvaluation, evaluate_texts

__all__ = [
    "Direction",
    "Evaluation",
    "HeldOut",
    "Sample",
    "Samples",
    "Score",
    "TextEvaluation",
    "bleu",
    "bleu_tokenizer",
    "chrf",
    "evaluate",
    "evaluate_texts",
    "held_out_loss",
    "negative_log_likelihood",
]
