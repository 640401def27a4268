"""Tensors on disk: safe reading, two-way name tables, assembling models, folders that are saved whole or not at all."""
