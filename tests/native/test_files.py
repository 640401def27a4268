"""GGUF files whose blocks go to the native side as they are stored, in the order of rows that our layout has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import polyformer as pf
from polyformer.errors import RunError
from polyformer.families import read_family
from polyformer.families.gguf import gguf_config
from polyformer.native.given import from_gguf
from polyformer.native.lowering import lower
from polyformer.native.machine import Machine
from polyformer.native.program import Multiply
from polyformer.native.runner import runner
from polyformer.weights.gguf import read_gguf
from tests.native.cases import compiled
from tests.weights.gguf_writer import gguf, plain, smollm2, stored

pytestmark = compiled

WIDTH, HIDDEN, WORDS, HEADS, GROUPS = 64, 96, 40, 4, 2
ROTATED: dict[str, Any] = {
    "context_length": 32,
    "embedding_length": WIDTH,
    "block_count": 2,
    "feed_forward_length": HIDDEN,
    "attention.head_count": HEADS,
    "attention.head_count_kv": GROUPS,
    "attention.layer_norm_rms_epsilon": 1e-5,
    "rope.freq_base": 10000.0,
}


def file_of(
    architecture: str, kinds: tuple[str, str], path: Path, keys: Mapping[str, Any] | None = None, **further: Any
) -> Path:
    """Write a small model; matrices are stored in these formats in turn. Keys and tensors may be added."""
    shapes = {
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (WIDTH // 2, WIDTH),
        "attn_v": (WIDTH // 2, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_up": (HIDDEN, WIDTH),
        "ffn_gate": (HIDDEN, WIDTH),
        "ffn_down": (WIDTH, HIDDEN),
    }
    tensors = {"token_embd.weight": stored("Q8_0", WORDS, WIDTH), "output_norm.weight": plain(torch.rand(WIDTH))}
    for layer in range(2):
        for i, (name, shape) in enumerate(shapes.items()):
            tensors[f"blk.{layer}.{name}.weight"] = stored(kinds[i % 2], *shape)
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{layer}.{name}.weight"] = plain(torch.rand(WIDTH))
        if architecture == "qwen2":
            for name in ("attn_q", "attn_k", "attn_v"):
                tensors[f"blk.{layer}.{name}.bias"] = plain(torch.randn(shapes[name][0]))
    metadata = {"general.architecture": architecture}
    metadata |= {f"{architecture}.{key}": value for key, value in ROTATED.items()}
    metadata["tokenizer.ggml.tokens"] = [f"t{i}" for i in range(WORDS)]
    path.write_bytes(gguf(metadata | dict(keys or {}), tensors | further))
    return path


def scores(file: Path, ids: list[int], weights: Any) -> Tensor:
    """Return the native scores of a text."""
    state = runner(file, weights, Machine(room=32)).state
    return torch.from_numpy(state.step(ids, [0] * len(ids), range(len(ids)), range(len(ids))))


def model_of(file: Path) -> Any:
    """Return the file's model in PyTorch, without its tokenizer."""
    read = read_gguf(file)
    config = gguf_config(read)
    family = read_family(config, str(file))
    from polyformer.families.gguf import gguf_names
    from polyformer.weights.assemble import assemble

    return assemble(family.spec(), family.names().to_ours(gguf_names(config).to_ours(read.tensors))).eval()


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("kinds", [("Q8_0", "Q4_1"), ("Q4_0", "Q8_0")])
def test_files_say_what_their_model_says(architecture: str, kinds: tuple[str, str], tmp_path: Path) -> None:
    file = file_of(architecture, kinds, tmp_path / "x.gguf")
    ids = [3, 1, 4, 1, 5, 9, 2, 6]
    with torch.inference_mode():
        wanted = model_of(file)(input_ids=torch.tensor([ids])).logits[0]
    assert float((scores(file, ids, "fp32") - wanted).norm() / wanted.norm()) < 1e-5
    # only what goes into the products is rounded now, to 8 bits; but attention on random blocks is all or nothing
    assert float((scores(file, ids, "as stored") - wanted).norm() / wanted.norm()) < 0.5


def test_blocks_are_taken_as_they_are(tmp_path: Path) -> None:
    path = file_of("llama", ("Q8_0", "Q4_1"), tmp_path / "x.gguf")
    file = read_gguf(path)
    config = gguf_config(file)
    family = read_family(config, str(path))
    program = lower(family.spec())
    give = from_gguf(program, file, family, config, 32)
    for one in program.write:
        if isinstance(one, Multiply):
            assert all(give(matrix).source in ("Q8_0", "Q4_1") for matrix in one.matrices)
    turned, straight = (give(f"decoder.blocks.0.steps.0.op.{name}.weight") for name in "qv")
    assert straight.order is None
    assert turned.order is not None
    assert turned.order[:4].tolist() == [0, 2, 4, 6]  # a head's pairs stand side by side in the file


def test_a_table_of_frequencies_is_checked_and_is_no_weight(tmp_path: Path) -> None:
    """As files of LLaMA 3.1 have it; this one scales nothing."""
    with_table = {"rope_freqs.weight": plain(torch.ones(WIDTH // HEADS // 2))}
    torch.manual_seed(0)
    tabled = file_of("llama", ("Q8_0", "Q4_1"), tmp_path / "y.gguf", **with_table)
    torch.manual_seed(0)
    plainly = file_of("llama", ("Q8_0", "Q4_1"), tmp_path / "x.gguf")
    assert scores(tabled, [3, 1, 4], "as stored").equal(scores(plainly, [3, 1, 4], "as stored"))


def test_a_folder_is_loaded_first(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is a folder; load it first, and give its model"):
        runner(tmp_path)


def test_smollm2_writes_what_its_floats_write() -> None:
    """The real model: its Q4_1 blocks as they are, against the same weights in single precision."""
    file = smollm2()
    loaded = pf.load(file)
    ids = loaded.texts.encode("The capital of France is")
    with torch.inference_mode():
        wanted = loaded.model(input_ids=torch.tensor([ids])).logits[0]
    assert float((scores(file, ids, "fp32") - wanted).norm() / wanted.norm()) < 2e-5
    found = scores(file, ids, "as stored")
    assert float((found - wanted).norm() / wanted.norm()) < 0.08
    assert loaded.texts.decode([int(found[-1].argmax())]) == " Paris"
