"""How good a model is: BLEU and chrF of its translations, loss and perplexity on held-out pairs."""

from polyformer.judge.evaluate import Direction, Evaluation, evaluate
from polyformer.judge.held_out import HeldOut, held_out_loss, negative_log_likelihood
from polyformer.judge.scores import Score, bleu, bleu_tokenizer, chrf

__all__ = [
    "Direction",
    "Evaluation",
    "HeldOut",
    "Score",
    "bleu",
    "bleu_tokenizer",
    "chrf",
    "evaluate",
    "held_out_loss",
    "negative_log_likelihood",
]
