"""What each part becomes in a program. To lower one more, write a function here; no family is named.

Dropout and its kin do nothing when a model writes, and become nothing.
"""

from __future__ import annotations

from typing import Literal

import torch

from polyformer import parts
from polyformer.native.builder import Builder, LoweringError, lowers
from polyformer.native.program import (
    NONE,
    Activated,
    ActivatedGate,
    AddPlaces,
    AddRows,
    BlendChosen,
    CacheShape,
    CapRows,
    ChooseExperts,
    ClipRows,
    DampRows,
    DistanceBuckets,
    ExpertChoice,
    Instruction,
    Look,
    MultiplyChosen,
    NormRows,
    Program,
    Remember,
    Rotate,
    ScaleRows,
    Slopes,
    TakeTokens,
    Waves,
)
from polyformer.parts.kernels.kernel import rules_of
from polyformer.parts.positions import Position
from polyformer.spec import Spec

FUSED = "fused products are for PyTorch; natively, queries, keys and values are read in one phase as they are"


def lower(spec: Spec) -> Program:
    """Return the program of a model that writes: a decoder with a head over words, behind an encoder or alone.

    Raises:
        LoweringError: naming the part that has no lowering, or can't be lowered as it is, and the reason.
    """
    if not isinstance(spec, parts.Transformer):
        raise LoweringError("", spec, "is no model by itself")
    return Builder(spec).program()


# ---------------------------------------------------------------------------------------------------------------
# From tokens to rows


@lowers(parts.Embed)
def _embed(spec: parts.Embed, builder: Builder, path: str, x: int) -> int:
    tokens = spec.tokens
    if not isinstance(tokens, parts.TokenEmbedding):
        raise LoweringError(f"{path}.tokens", tokens, "there is no lowering for it")
    if spec.others:
        raise LoweringError(path, spec, f"it reads {spec.others[0].input} beside tokens")
    table = builder.weight(f"{path}.tokens.weight", tokens.vocabulary, tokens.width)
    scale = float(torch.tensor(spec.scale, dtype=torch.float32)) if spec.rounding == "model" else spec.scale
    rows = builder.emit(TakeTokens(builder.fresh(tokens.width), table, scale))
    if spec.positions is not None:
        if not isinstance(spec.combine, parts.Add):
            raise LoweringError(f"{path}.combine", spec.combine, "only positions that are added are lowered")
        if spec.positions.width != tokens.width:
            raise LoweringError(f"{path}.positions", spec.positions, "it is of another width than the tokens")
        rows = builder.emit(_places(spec.positions, builder, f"{path}.positions", rows))
    for name in ("norm", "project"):
        part = getattr(spec, name)
        rows = rows if part is None else builder.lower(part, f"{path}.{name}", rows)
    return rows


def _places(spec: Position | parts.AfterPrefix, builder: Builder, path: str, x: int) -> Instruction:
    """Learned positions are rows of their table; computed ones are those of a table that is made when it is loaded."""
    builder.limit(spec.length)
    weight = f"{path}.weight"
    if isinstance(spec, parts.Learned):
        assert spec.length is not None
        table, offset = builder.weight(weight, spec.offset + spec.length, spec.width), spec.offset
    elif isinstance(spec, parts.Table):
        assert spec.length is not None
        table, offset = builder.weight(weight, spec.length, spec.width), 0
    elif isinstance(spec, parts.Sinusoidal):
        table, offset = builder.weight(weight, spec.length or 0, spec.width, made=spec), 0
    else:
        raise LoweringError(path, spec, "there is no lowering for it")
    return AddPlaces(builder.fresh(spec.width), x, table, offset)


# ---------------------------------------------------------------------------------------------------------------
# What blocks are put together by


@lowers(parts.Stack)
def _stack(spec: parts.Stack, builder: Builder, path: str, x: int) -> int:
    for i, block in enumerate(spec.blocks):
        x = builder.lower(block, f"{path}.blocks.{i}", x)
    if path == "decoder":
        x = builder.pick(x)
    return x if spec.norm is None else builder.lower(spec.norm, f"{path}.norm", x)


@lowers(parts.Chain)
def _chain(spec: parts.Chain, builder: Builder, path: str, x: int) -> int:
    for i, step in enumerate(spec.steps):
        x = builder.lower(step, f"{path}.steps.{i}", x)
    return x


@lowers(parts.Branches)
def _branches(spec: parts.Branches, builder: Builder, path: str, x: int) -> int:
    total, *others = (builder.lower(step, f"{path}.steps.{i}", x) for i, step in enumerate(spec.steps))
    for other in others:
        total = builder.emit(AddRows(builder.fresh(builder.width[total]), total, other))
    return total


@lowers(parts.Residual)
def _residual(spec: parts.Residual, builder: Builder, path: str, x: int) -> int:
    y = x
    for name in ("pre", "op", "post"):
        part = getattr(spec, name)
        y = y if part is None else builder.lower(part, f"{path}.{name}", y)
    x = builder.emit(AddRows(builder.fresh(builder.width[x]), x, y))
    return x if spec.after is None else builder.lower(spec.after, f"{path}.after", x)


@lowers(parts.Dropout, parts.DropPath, parts.Idle)
def _nothing(spec: Spec, builder: Builder, path: str, x: int) -> int:
    return x


# ---------------------------------------------------------------------------------------------------------------
# Parts that work row by row


@lowers(parts.Linear)
def _linear(spec: parts.Linear, builder: Builder, path: str, x: int) -> int:
    matrix = builder.weight(f"{path}.weight", spec.outputs, spec.inputs)
    bias = builder.optional(spec.bias, f"{path}.bias", spec.outputs)
    return builder.multiply(x, matrix, bias, spec.outputs)


@lowers(parts.Adapted)
def _adapted(spec: parts.Adapted, builder: Builder, path: str, x: int) -> int:
    """LoRA is two small products more. What else stands beside a matrix is to be merged into it first."""
    y = builder.lower(spec.base, f"{path}.base", x)
    for i, one in enumerate(spec.adapters):
        where = f"{path}.adapters.{i}"
        if not one.share:
            continue
        if type(one) is not parts.LoRA:
            raise LoweringError(where, one, "it has no lowering; merge it into its matrix first")
        narrow = builder.multiply(x, builder.weight(f"{where}.a", one.rank, one.inputs), NONE, one.rank)
        narrow = builder.emit(ScaleRows(builder.fresh(one.rank), narrow, one.scale * one.share))
        wide = builder.multiply(narrow, builder.weight(f"{where}.b", one.outputs, one.rank), NONE, one.outputs)
        y = builder.emit(AddRows(builder.fresh(one.outputs), y, wide))
    return y


@lowers(parts.LayerNorm, parts.RMSNorm)
def _norm(spec: parts.LayerNorm | parts.RMSNorm, builder: Builder, path: str, x: int) -> int:
    gain = builder.optional(spec.gain, f"{path}.weight", spec.width)
    out = builder.fresh(builder.width[x])
    if isinstance(spec, parts.RMSNorm):
        return builder.emit(NormRows(out, x, "rms", spec.width, spec.eps, gain, NONE, spec.offset if gain else 0.0))
    bias = builder.optional(spec.bias, f"{path}.bias", spec.width)
    return builder.emit(NormRows(out, x, "layer", spec.width, spec.eps, gain, bias))


@lowers(parts.PerHead)
def _per_head(spec: parts.PerHead, builder: Builder, path: str, x: int) -> int:
    return builder.lower(spec.norm, f"{path}.norm", x)


@lowers(parts.FeedForward)
def _feed_forward(spec: parts.FeedForward, builder: Builder, path: str, x: int) -> int:
    if spec.gate_up is not None:
        raise LoweringError(f"{path}.gate_up", spec.gate_up, FUSED)
    up = builder.lower(spec.up, f"{path}.up", x)
    out = builder.fresh(builder.width[up])
    if spec.gate is None:
        hidden = builder.emit(Activated(out, up, spec.activation))
    else:
        gate = builder.lower(spec.gate, f"{path}.gate", x)
        hidden = builder.emit(ActivatedGate(out, gate, up, spec.activation))
    return builder.lower(spec.down, f"{path}.down", hidden)


@lowers(parts.Gated)
def _gated(spec: parts.Gated, builder: Builder, path: str, x: int) -> int:
    made, gate = builder.lower(spec.op, f"{path}.op", x), builder.lower(spec.gate, f"{path}.gate", x)
    if builder.width[gate] != 1:
        raise LoweringError(f"{path}.gate", spec.gate, "only a gate of one number for each row is lowered")
    return builder.emit(DampRows(builder.fresh(builder.width[made]), made, gate))


@lowers(parts.Experts)
def _experts(spec: parts.Experts, builder: Builder, path: str, x: int) -> int:
    """A choice for each row, and products with the chosen experts' matrices only."""
    one = spec.experts[0]
    if not isinstance(one, parts.FeedForward) or any(other != one for other in spec.experts):
        raise LoweringError(
            f"{path}.experts", one, "only experts that are feed-forward networks, all alike, are lowered"
        )
    if one.gate_up is not None:
        raise LoweringError(f"{path}.experts.0.gate_up", one.gate_up, FUSED)
    scores = builder.lower(spec.router, f"{path}.router", x)
    choice = builder.choice(ExpertChoice(len(spec.experts), spec.chosen))
    shares = builder.fresh(spec.chosen)
    builder.emit(ChooseExperts(shares, scores, choice, spec.weights, spec.capacity or 0))
    if one.gate is None:
        (up,) = _of_experts(spec, builder, path, (x, choice), ("up",))
        hidden = builder.emit(Activated(builder.fresh(builder.width[up]), up, one.activation))
    else:
        gate, up = _of_experts(spec, builder, path, (x, choice), ("gate", "up"))
        hidden = builder.emit(ActivatedGate(builder.fresh(builder.width[up]), gate, up, one.activation))
    (made,) = _of_experts(spec, builder, path, (hidden, choice), ("down",))
    return builder.emit(BlendChosen(builder.fresh(builder.width[made] // spec.chosen), made, shares, choice))


def _of_experts(
    spec: parts.Experts, builder: Builder, path: str, rows: tuple[int, int], names: tuple[str, ...]
) -> tuple[int, ...]:
    """Multiply rows, a register and a choice, by the chosen experts' matrices of these names; return the registers."""
    outs, matrices, biases = [], [], []
    for name in names:
        linear = getattr(spec.experts[0], name)
        if not isinstance(linear, parts.Linear):
            raise LoweringError(f"{path}.experts.0.{name}", linear, "of experts, only plain matrices are lowered")
        outs.append(builder.fresh(spec.chosen * linear.outputs))
        for i in range(len(spec.experts)):
            matrices.append(builder.weight(f"{path}.experts.{i}.{name}.weight", linear.outputs, linear.inputs))
            biases.append(builder.optional(linear.bias, f"{path}.experts.{i}.{name}.bias", linear.outputs))
    builder.emit(MultiplyChosen(tuple(outs), *rows, tuple(matrices), tuple(biases)))
    return tuple(outs)


@lowers(parts.Activate)
def _activate(spec: parts.Activate, builder: Builder, path: str, x: int) -> int:
    return builder.emit(Activated(builder.fresh(builder.width[x]), x, spec.activation))


@lowers(parts.Identity)
def _identity(spec: parts.Identity, builder: Builder, path: str, x: int) -> int:
    return x


@lowers(parts.Scale)
def _scale(spec: parts.Scale, builder: Builder, path: str, x: int) -> int:
    return builder.emit(ScaleRows(builder.fresh(builder.width[x]), x, spec.by))


@lowers(parts.Clip)
def _clip(spec: parts.Clip, builder: Builder, path: str, x: int) -> int:
    return builder.emit(ClipRows(builder.fresh(builder.width[x]), x, spec.limit))


@lowers(parts.LMHead)
def _lm_head(spec: parts.LMHead, builder: Builder, path: str, x: int) -> int:
    x = builder.pick(x)
    if spec.before is not None:
        x = builder.lower(spec.before, f"{path}.before", x)
    if spec.scale != 1.0:
        x = builder.emit(ScaleRows(builder.fresh(builder.width[x]), x, spec.scale))
    x = builder.lower(spec.projection, f"{path}.projection", x)
    return x if spec.cap is None else builder.emit(CapRows(builder.fresh(builder.width[x]), x, spec.cap))


# ---------------------------------------------------------------------------------------------------------------
# Attention


@lowers(parts.Attention)
def _attention(spec: parts.Attention, builder: Builder, path: str, x: int) -> int:
    if spec.qkv is not None:
        raise LoweringError(f"{path}.qkv", spec.qkv, FUSED)
    q, k, v = (builder.lower(getattr(spec, name), f"{path}.{name}", x) for name in "qkv")
    if isinstance(spec.position, parts.Rotary):
        waves = builder.waves(_waves(spec.position, f"{path}.position"))
        layout = spec.position.layout
        q = builder.emit(Rotate(builder.fresh(builder.width[q]), q, waves, spec.heads.count, layout))
        k = builder.emit(Rotate(builder.fresh(builder.width[k]), k, waves, spec.heads.groups, layout))
    cache = builder.cache(CacheShape(spec.heads.groups, spec.heads.width))
    builder.emit(Remember(k, v, cache))
    scale, cap = _scores(spec, path)
    rule, window = _sight(spec, builder, path)
    bias = _bias(spec, builder, f"{path}.position")
    out = builder.fresh(spec.heads.count * spec.heads.width)
    mixed = builder.emit(Look(out, q, cache, spec.heads.count, scale, rule, window, cap, bias))
    return builder.lower(spec.o, f"{path}.o", mixed)


@lowers(parts.CrossAttention)
def _cross_attention(spec: parts.CrossAttention, builder: Builder, path: str, x: int) -> int:
    """The memory's keys and values are made once, when it is read; the decoder's rows look at all of them."""
    if builder.memory is None:
        raise LoweringError(path, spec, "there is no encoder for it to look at")
    kv = []
    for name in "kv":
        linear = getattr(spec, name)
        if not isinstance(linear, parts.Linear):
            raise LoweringError(f"{path}.{name}", linear, "of a memory, only plain matrices are lowered")
        matrix = builder.weight(f"{path}.{name}.weight", linear.outputs, linear.inputs)
        bias = builder.optional(linear.bias, f"{path}.{name}.bias", linear.outputs)
        kv.append(builder.multiply_memory(matrix, bias, linear.outputs))
    cache = builder.cache(CacheShape(spec.heads.groups, spec.heads.width, "memory"))
    builder.read(Remember(kv[0], kv[1], cache))
    scale, cap = _scores(spec, path)
    q = builder.lower(spec.q, f"{path}.q", x)
    out = builder.fresh(spec.heads.count * spec.heads.width)
    mixed = builder.emit(Look(out, q, cache, spec.heads.count, scale, "all", cap=cap))
    return builder.lower(spec.o, f"{path}.o", mixed)


def _scores(spec: parts.Attention | parts.CrossAttention, path: str) -> tuple[float, float]:
    """Return the scale of scores and their cap, 0 if there is none."""
    kernel = spec.kernel
    if not isinstance(kernel, parts.Softmax | parts.Capped):
        raise LoweringError(f"{path}.kernel", kernel, "only exact softmax attention is lowered")
    scale = spec.heads.width**-0.5 if kernel.scale is None else kernel.scale
    return scale, kernel.cap if isinstance(kernel, parts.Capped) else 0.0


def _sight(spec: parts.Attention, builder: Builder, path: str) -> tuple[Literal["causal", "all"], int]:
    """Return the rule, and how many keys are seen at most, 0 for all. Each slot is a document of its own."""
    causal, window = False, 0
    for rule in rules_of(spec.see):
        if isinstance(rule, parts.Window) and rule.step > 1:
            raise LoweringError(path, spec, "a window that leaves keys out has no lowering")
        if isinstance(rule, parts.Window):
            window = min(window or rule.width, rule.width)
        elif isinstance(rule, parts.Causal):
            causal = True
        elif not isinstance(rule, parts.SameDocument | parts.Everyone):
            raise LoweringError(path, spec, f"the rule {type(rule).__name__} has no lowering")
    if causal:
        return "causal", window
    if builder.memory is not None or builder.model.encoder is None:
        raise LoweringError(path, spec, "a decoder that looks ahead can't write token by token")
    if window:
        raise LoweringError(path, spec, "a window to both sides has no lowering")
    return "all", 0


def _waves(spec: parts.Rotary, path: str) -> Waves:
    if isinstance(spec.scaling, parts.Dynamic):
        raise LoweringError(path, spec, "its angles depend on the length of the text")
    if spec.scaling is None:
        return Waves(tuple(spec.plain().tolist()))
    return Waves(tuple(spec.scaling.frequencies(spec, 0).tolist()), spec.scaling.strength())


def _bias(spec: parts.Attention, builder: Builder, path: str) -> Slopes | DistanceBuckets | None:
    position = spec.position
    if position is None or isinstance(position, parts.Rotary):
        return None
    if isinstance(position, parts.Alibi):
        return Slopes(tuple(position.slopes()), position.scale, position.precision)
    if isinstance(position, parts.Buckets):
        table = builder.weight(f"{path}.weight", position.count, position.heads)
        return DistanceBuckets(table, position.count, position.distance, position.two_sided)
    raise LoweringError(path, position, "there is no lowering for it")
