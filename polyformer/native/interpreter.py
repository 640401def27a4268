"""A program run in plain PyTorch, instruction by instruction: what the native run is held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.errors import RunError
from polyformer.native import program as ir
from polyformer.parts.feedforward import ACTIVATIONS
from polyformer.parts.positions import Sinusoidal, SinusoidalPart

Pair = tuple[Tensor, Tensor]


@dataclass
class _Step:
    """What one step's instructions share: which rows there are, what registers hold [N, width], and choices [N, C]."""

    ids: Tensor
    slots: list[int]
    places: Tensor
    wanted: Tensor
    registers: dict[int, Tensor] = field(default_factory=dict)
    choices: dict[int, Tensor] = field(default_factory=dict)


class Interpreter:
    """Runs a program on sequences that are held in slots.

    Args:
        program: what to run.
        weights: by path, as the program names them.
        slots: how many sequences there may be at once.
    """

    def __init__(self, program: ir.Program, weights: Mapping[str, Tensor], slots: int = 1) -> None:
        self.program, self.slots = program, slots
        self.weights = {one.path: _weight(one, weights) for one in program.weights}
        self._held: list[dict[int, Pair]] = [{} for _ in range(slots)]
        self._lengths = [0] * slots

    def length(self, slot: int) -> int:
        """Return how many tokens a slot holds."""
        return self._lengths[slot]

    def step(self, ids: Sequence[int], slots: Sequence[int], places: Sequence[int], wanted: Sequence[int]) -> Tensor:
        """Read tokens, each at its place in its slot; return the scores behind those wanted (by index) [N', V].

        Raises:
            RunError: a slot or a token that isn't there, places with a gap before them or beyond the model's.
        """
        self._check(ids, slots, places, wanted)
        for slot, place in zip(slots, places, strict=True):
            self._lengths[slot] = place + 1
        given = torch.tensor(ids), list(slots), torch.tensor(places), torch.tensor(wanted, dtype=torch.long)
        return self._run(self.program.write, _Step(*given))[self.program.scores]

    def read(self, ids: Sequence[int], slot: int) -> None:
        """Let the encoder read a text, which the decoder will look at from this slot; whatever it held is dropped."""
        self.clear(slot)
        many = torch.arange(len(ids))
        self._run(self.program.read, _Step(torch.tensor(ids), [slot] * len(ids), many, many))

    def clear(self, slot: int) -> None:
        """Forget all that a slot holds."""
        self._lengths[slot], self._held[slot] = 0, {}

    def truncate(self, slot: int, length: int) -> None:
        """Keep only the first so many tokens."""
        self._lengths[slot] = min(length, self._lengths[slot])

    def copy(self, source: int, target: int, length: int) -> None:
        """Let a slot hold the first tokens of another, and what that has read."""
        self._held[target] = dict(self._held[source])
        self._lengths[target] = min(length, self._lengths[source])

    def _check(self, ids: Sequence[int], slots: Sequence[int], places: Sequence[int], wanted: Sequence[int]) -> None:
        ends: dict[int, int] = {}
        for token, slot, place in zip(ids, slots, places, strict=True):
            if not 0 <= slot < self.slots:
                raise RunError(f"there is no slot {slot}; there are {self.slots}")
            if not 0 <= token < self.program.vocabulary:
                raise RunError(f"there is no token {token} in a vocabulary of {self.program.vocabulary}")
            held = ends.get(slot, self._lengths[slot])
            if not (place == held or (slot not in ends and 0 <= place < held)):
                raise RunError(f"slot {slot} holds {held} tokens; the next can't stand at place {place}")
            if self.program.length and place >= self.program.length:
                raise RunError(f"place {place} is beyond the model's {self.program.length} places")
            ends[slot] = place + 1
        if any(not 0 <= row < len(ids) for row in wanted):
            raise RunError("scores are wanted of a row that isn't there")

    def _run(self, steps: tuple[ir.Instruction, ...], step: _Step) -> dict[int, Tensor]:
        for one in steps:
            RUN[type(one)](self, one, step)
        return step.registers


def _weight(one: ir.Weight, weights: Mapping[str, Tensor]) -> Tensor:
    if isinstance(one.made, Sinusoidal):
        return SinusoidalPart(one.made).rows(one.shape[0] or 4096)
    if one.path not in weights:
        raise RunError(f"the program reads {one.path}, which is not among the weights")
    found = weights[one.path].detach().float()
    if found.shape != one.shape:
        raise RunError(f"{one.path} has the shape {list(found.shape)}, but the program wants {list(one.shape)}")
    return found


# ---------------------------------------------------------------------------------------------------------------
# Instructions


def _take(run: Interpreter, one: ir.TakeTokens, step: _Step) -> None:
    step.registers[one.out] = run.weights[one.table][step.ids] * one.scale


def _add_places(run: Interpreter, one: ir.AddPlaces, step: _Step) -> None:
    step.registers[one.out] = step.registers[one.x] + run.weights[one.table][step.places + one.offset]


def _norm(run: Interpreter, one: ir.NormRows, step: _Step) -> None:
    x = torch.unflatten(step.registers[one.x], -1, (-1, one.width))
    gain = run.weights[one.gain] + one.offset if one.gain else None
    if one.kind == "rms":
        found = F.rms_norm(x, (one.width,), gain, one.eps)
    else:
        found = F.layer_norm(x, (one.width,), gain, run.weights[one.bias] if one.bias else None, one.eps)
    step.registers[one.out] = found.flatten(-2)


def _multiply(run: Interpreter, one: ir.Multiply, step: _Step) -> None:
    x = step.registers[one.x]
    for out, matrix, bias in zip(one.outs, one.matrices, one.biases, strict=True):
        step.registers[out] = F.linear(x, run.weights[matrix], run.weights[bias] if bias else None)


def _choose(run: Interpreter, one: ir.ChooseExperts, step: _Step) -> None:
    count = run.program.choices[one.choice].chosen
    shares, experts = step.registers[one.x].softmax(-1).topk(count)
    if one.among == "chosen":
        shares = shares / shares.sum(-1, keepdim=True)
    if one.capacity:
        taken: dict[tuple[int, int], int] = {}
        for row, slot in enumerate(step.slots):
            for i, expert in enumerate(experts[row].tolist()):
                taken[slot, expert] = taken.get((slot, expert), 0) + 1
                shares[row, i] *= taken[slot, expert] <= one.capacity
    step.registers[one.out], step.choices[one.choice] = shares, experts


def _multiply_chosen(run: Interpreter, one: ir.MultiplyChosen, step: _Step) -> None:
    """Row by row and expert by expert."""
    chosen, experts = step.choices[one.choice], run.program.choices[one.choice].experts
    inputs = run.weights[one.matrices[0]].shape[1]
    x = torch.unflatten(step.registers[one.x], -1, (-1, inputs))
    for i, out in enumerate(one.outs):
        found = []
        for row, numbers in enumerate(chosen.tolist()):
            for place, expert in enumerate(numbers):
                matrix, bias = (names[i * experts + expert] for names in (one.matrices, one.biases))
                own = x[row, place if x.shape[1] > 1 else 0]
                found.append(F.linear(own, run.weights[matrix], run.weights[bias] if bias else None))
        step.registers[out] = torch.stack(found).view(len(chosen), -1)


def _blend(run: Interpreter, one: ir.BlendChosen, step: _Step) -> None:
    shares = step.registers[one.shares]
    step.registers[one.out] = (
        torch.unflatten(step.registers[one.x], -1, (shares.shape[1], -1)) * shares[..., None]
    ).sum(1)


def _damp(run: Interpreter, one: ir.DampRows, step: _Step) -> None:
    step.registers[one.out] = torch.sigmoid(step.registers[one.gate]) * step.registers[one.x]


def _rotate(run: Interpreter, one: ir.Rotate, step: _Step) -> None:
    waves = run.program.waves[one.waves]
    x = torch.unflatten(step.registers[one.x], -1, (one.heads, -1))
    angles = (step.places[:, None].float() * torch.tensor(waves.rates))[:, None]
    cos, sin = angles.cos() * waves.strength, angles.sin() * waves.strength
    width = 2 * len(waves.rates)
    turning, rest = x[..., :width], x[..., width:]
    first, second = turning.chunk(2, -1) if one.layout == "halves" else (turning[..., 0::2], turning[..., 1::2])
    turned = (first * cos - second * sin, second * cos + first * sin)
    together = torch.cat(turned, -1) if one.layout == "halves" else torch.stack(turned, -1).flatten(-2)
    step.registers[one.out] = torch.cat((together, rest), -1).flatten(-2)


def _remember(run: Interpreter, one: ir.Remember, step: _Step) -> None:
    shape = run.program.caches[one.cache]
    new = [torch.unflatten(step.registers[number], -1, (shape.groups, shape.width)) for number in (one.k, one.v)]
    for i, (slot, place) in enumerate(zip(step.slots, step.places.tolist(), strict=True)):
        held = run._held[slot].get(one.cache)
        rows = [x[i : i + 1] for x in new]
        kept = rows if held is None else [torch.cat((old[:place], row)) for old, row in zip(held, rows, strict=True)]
        run._held[slot][one.cache] = (kept[0], kept[1])


def _look(run: Interpreter, one: ir.Look, step: _Step) -> None:
    """Row by row; a row sees nothing behind its own place, however far the step has filled the cache."""
    q_NHE = torch.unflatten(step.registers[one.q], -1, (one.heads, -1))
    found = []
    for i, (slot, place) in enumerate(zip(step.slots, step.places.tolist(), strict=True)):
        keys_KGE, values_KGE = run._held[slot][one.cache]
        end = place + 1 if one.rule == "causal" else len(keys_KGE)
        begin = max(0, end - one.window) if one.window else 0
        repeats = one.heads // keys_KGE.shape[1]
        keys, values = (x[begin:end].repeat_interleave(repeats, 1) for x in (keys_KGE, values_KGE))
        scores_HK = torch.einsum("he,khe->hk", q_NHE[i], keys) * one.scale
        if one.cap:
            scores_HK = torch.tanh(scores_HK / one.cap) * one.cap
        if one.bias is not None:
            scores_HK = scores_HK + _bias(run, one.bias, torch.arange(begin, end), place)
        found.append(torch.einsum("hk,khe->he", scores_HK.softmax(-1), values).flatten())
    step.registers[one.out] = torch.stack(found)


def _bias(run: Interpreter, bias: ir.Slopes | ir.DistanceBuckets, keys: Tensor, place: int) -> Tensor:
    """Return what is added to the scores of a row: [H, K]."""
    if isinstance(bias, ir.Slopes):
        slopes = torch.tensor(bias.slopes)[:, None]
        if bias.precision == "bfloat16":
            return (slopes.bfloat16() * keys.bfloat16()).float() * bias.scale
        return -bias.scale * slopes * (keys - place).abs()
    apart = keys - place
    count = bias.count // 2 if bias.two_sided else bias.count
    behind = (apart > 0) * count if bias.two_sided else torch.zeros_like(apart)
    away = apart.abs() if bias.two_sided else (-apart).clamp(min=0)
    fine = count // 2
    share = (away.clamp(min=fine).float() / fine).log() / math.log(bias.distance / fine)
    coarse = (fine + (share * (count - fine)).long()).clamp(max=count - 1)
    return run.weights[bias.table][behind + torch.where(away < fine, away, coarse)].T


def _apply(run: Interpreter, one: ir.Activated, step: _Step) -> None:
    step.registers[one.out] = ACTIVATIONS[one.function](step.registers[one.x])


def _gate(run: Interpreter, one: ir.ActivatedGate, step: _Step) -> None:
    step.registers[one.out] = ACTIVATIONS[one.function](step.registers[one.gate]) * step.registers[one.up]


def _add(run: Interpreter, one: ir.AddRows, step: _Step) -> None:
    step.registers[one.out] = step.registers[one.x] + step.registers[one.y]


def _scale(run: Interpreter, one: ir.ScaleRows, step: _Step) -> None:
    step.registers[one.out] = step.registers[one.x] * one.by


def _clip(run: Interpreter, one: ir.ClipRows, step: _Step) -> None:
    step.registers[one.out] = step.registers[one.x].clamp(-one.limit, one.limit)


def _cap(run: Interpreter, one: ir.CapRows, step: _Step) -> None:
    step.registers[one.out] = torch.tanh(step.registers[one.x] / one.cap) * one.cap


def _pick(run: Interpreter, one: ir.PickRows, step: _Step) -> None:
    step.registers[one.out] = step.registers[one.x][step.wanted]


RUN: dict[type[ir.Instruction], Callable[[Interpreter, Any, _Step], None]] = {
    ir.TakeTokens: _take,
    ir.AddPlaces: _add_places,
    ir.NormRows: _norm,
    ir.Multiply: _multiply,
    ir.Rotate: _rotate,
    ir.Remember: _remember,
    ir.Look: _look,
    ir.Activated: _apply,
    ir.ActivatedGate: _gate,
    ir.AddRows: _add,
    ir.ScaleRows: _scale,
    ir.ClipRows: _clip,
    ir.CapRows: _cap,
    ir.PickRows: _pick,
    ir.ChooseExperts: _choose,
    ir.MultiplyChosen: _multiply_chosen,
    ir.BlendChosen: _blend,
    ir.DampRows: _damp,
}
"""What runs each instruction."""
