"""Tuning by rewriting: adapters beside a model's matrices, merged or apart, and their files."""

from polyformer.tune.attach import (
    AdapterSet,
    adapter_of,
    attach,
    detach,
    freeze,
    rebuilt,
    train_adapters,
    using,
)
from polyformer.tune.changes import (
    AddAdapters,
    DoraChange,
    Ia3Change,
    LoraChange,
    Placed,
    RankFor,
    RemoveAdapters,
    SetShares,
    Shared,
    ShareOf,
    adapters_of,
)
from polyformer.tune.merge import MergeChange, Merged, merge, unmerge
from polyformer.tune.prompts import PrefixChange, PromptChange, prompt_ids
from polyformer.tune.reading import read_adapter
from polyformer.tune.targets import ALL_LINEAR, targets
from polyformer.tune.writing import write_adapter

__all__ = [
    "ALL_LINEAR",
    "AdapterSet",
    "AddAdapters",
    "DoraChange",
    "Ia3Change",
    "LoraChange",
    "MergeChange",
    "Merged",
    "Placed",
    "PrefixChange",
    "PromptChange",
    "RankFor",
    "RemoveAdapters",
    "SetShares",
    "ShareOf",
    "Shared",
    "adapter_of",
    "adapters_of",
    "attach",
    "detach",
    "freeze",
    "merge",
    "prompt_ids",
    "read_adapter",
    "rebuilt",
    "targets",
    "train_adapters",
    "unmerge",
    "using",
    "write_adapter",
]
