"""The options of verbs that run a model: in what form, with which adapter, and what guesses ahead."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, get_args

from polyformer.cli.common import Adapter, Guess, Weights, load_model
from polyformer.cli.gather import Verb, gathers
from polyformer.errors import RunError

if TYPE_CHECKING:
    from polyformer.loaded import Loaded, Writer
    from polyformer.native.kinds import Precision


class Opening(NamedTuple):
    """How a model is opened that is to write, natively where it can.

    Attributes:
        adapter: a folder in PEFT's layout.
        weights: how matrices are held, or "pytorch"; None for what the model recommends.
        guess: what guesses tokens ahead.
    """

    adapter: Path | None = None
    weights: str | None = None
    guess: str | None = None

    def writer(self, model: Path) -> Loaded | Writer:
        """Open a model that continues texts."""
        if self.weights == "pytorch" or self.adapter is not None or self.guess not in (None, "lookup"):
            return self.loaded(model)  # blocks of the model itself, if they guess, must be in memory
        from polyformer.loaded import open_writer

        return open_writer(model, self.precision())

    def loaded(self, model: Path) -> Loaded:
        """Load a model, also one whose searches are to run natively."""
        if self.weights == "pytorch":
            return load_model(model, self.adapter)
        if self.adapter is not None:
            from polyformer.loaded.adapted import to_write

            return to_write(load_model(model, self.adapter), self.precision())
        from polyformer.loaded import load_to_write

        return load_to_write(model, self.precision())

    def precision(self) -> Precision | None:
        """Return how matrices are held natively; raises `RunError` for a way that isn't known."""
        from polyformer.native.kinds import Precision

        kinds: tuple[Precision, ...] = get_args(Precision)
        asked = self.weights and self.weights.replace("-", " ")
        if asked is not None and asked not in kinds:
            raise RunError(f"there are no weights '{self.weights}'; choose one of {', '.join(kinds)}, pytorch")
        return next((kind for kind in kinds if kind == asked), None)


FLAGS = {"adapter": Adapter, "weights": Weights, "guess": Guess}


def opening(verb: Verb) -> Verb:
    """Give a verb `--adapter`, `--weights` and `--guess` in place of its parameter `opened`."""
    return gathers("opened", FLAGS, {}, lambda values: Opening(**values))(verb)
