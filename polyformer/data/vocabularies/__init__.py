"""Readers of the formats in which vocabularies come; each gives what a `tokenizer.json` would say."""

from polyformer.data.vocabularies.folder import read_folder
from polyformer.data.vocabularies.format import ROLES, Vocabulary
from polyformer.data.vocabularies.gguf import read_gguf
from polyformer.data.vocabularies.guard import build, new_names, renamed

__all__ = ["ROLES", "Vocabulary", "build", "new_names", "read_folder", "read_gguf", "renamed"]
