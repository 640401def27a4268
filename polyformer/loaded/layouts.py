"""What the files of a model's folder are called."""

SPEC, LABELS = "spec.json", "labels.json"
"""Of a folder of ours."""

CONFIG = "config.json"
"""Of a Hugging Face folder."""

GENERATION = "generation_config.json"
"""Of either: special tokens and search settings."""

MODULES = "modules.json"
"""How a folder of sentence-transformers turns rows into a text's vector."""
