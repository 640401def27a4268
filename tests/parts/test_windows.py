"""Patches, grids and windows: against plain loops, and the same bias on other models."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts import (
    Attention,
    Causal,
    Chain,
    Everyone,
    Flow,
    GridBias,
    GridPositions,
    Heads,
    LayerNorm,
    Learned,
    Linear,
    Patches,
    PatchMerging,
    Pyramid,
    Residual,
    SameDocument,
    Sinusoidal,
    Stack,
    Token,
    Trace,
    Windows,
)
from polyformer.parts.flow import GrowingCache, start_flow
from polyformer.parts.inputs import Given, InputPart

WIDTH, HEADS = 8, 2


def on_grid(height: int, width: int, batch: int = 2) -> tuple[Tensor, Flow]:
    """Return random rows on a grid, and their flow."""
    x = torch.randn(batch, height * width, WIDTH)
    flow = start_flow(x)
    flow.grid = (height, width)
    return x, flow


def attention(window: int, bias: bool = True) -> Attention:
    """Return the attention of a window."""
    made = Attention.of_width(WIDTH, HEADS, SameDocument())
    return made.replace(position=GridBias(HEADS, window, window)) if bias else made


def by_hand(part: torch.nn.Module, x: Tensor, grid: tuple[int, int], window: int, shift: int) -> Tensor:
    """Attend row by row: which rows share a window is asked of their places, not of reshaped tensors."""
    height, width = grid
    bottom, right = -height % window, -width % window
    tall, wide = height + bottom, width + right
    full = F.pad(x.view(len(x), height, width, -1), (0, 0, 0, right, 0, bottom))
    table = part.op.position.weight
    out = torch.zeros_like(full)

    def window_of(row: int, column: int) -> tuple[int, ...]:
        """Which window a place falls in after the roll, and whether it came round the edge within the last one."""
        found: list[int] = []
        for place, side in ((row, tall), (column, wide)):
            rolled = (place - shift) % side
            found += [rolled // window, int(place < shift)]
        return tuple(found)

    places = [(row, column) for row in range(tall) for column in range(wide)]
    for row, column in places:
        mates = [one for one in places if window_of(*one) == window_of(row, column)]
        keys = torch.stack([full[:, r, c] for r, c in mates], 1)
        q = part.op.q(full[:, row, column]).view(len(x), HEADS, -1)
        k, v = (getattr(part.op, name)(keys).view(len(x), len(mates), HEADS, -1) for name in "kv")
        scores = torch.einsum("bhe,bkhe->bhk", q, k) * q.shape[-1] ** -0.5
        offsets = [
            (
                ((row - shift) % tall % window) - ((r - shift) % tall % window),
                ((column - shift) % wide % window) - ((c - shift) % wide % window),
            )
            for r, c in mates
        ]
        index = torch.tensor([(d + window - 1) * (2 * window - 1) + a + window - 1 for d, a in offsets])
        weights = (scores + table[index].T).softmax(-1)
        out[:, row, column] = part.op.o(torch.einsum("bhk,bkhe->bhe", weights, v).flatten(1))
    return out[:, :height, :width].flatten(1, 2)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("grid", [(6, 6), (7, 4), (5, 8)], ids=str)
def test_windows_are_what_they_say(grid: tuple[int, int], shift: int) -> None:
    part = Windows(attention(3), 3, shift).build()
    x, flow = on_grid(*grid)
    with torch.no_grad():
        part.op.position.weight.normal_()
        torch.testing.assert_close(part(x, flow), by_hand(part, x, grid, 3, shift), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("shift", [0, 2])
def test_a_window_of_the_whole_grid_is_plain_attention(shift: int) -> None:
    """A grid no larger than a window has but one, unshifted; offsets beyond the table take the nearest one's."""
    part = Windows(attention(4), 4, shift).build()
    plain = attention(4).build()
    plain.load_state_dict(part.op.state_dict())
    x, flow = on_grid(3, 3)
    torch.testing.assert_close(part(x, flow), plain(x, flow))
    small, wide = GridBias(HEADS, 2, 2).build(), GridBias(HEADS, 3, 3).build()
    with torch.no_grad():
        wide.weight.normal_()
        small.weight.copy_(wide.weight.view(5, 5, HEADS)[1:4, 1:4].reshape(9, HEADS))
        far = wide.weight.view(5, 5, HEADS)
        far[0], far[4] = far[1], far[3]
        far[:, 0], far[:, 4] = far[:, 1], far[:, 3]
    q = torch.zeros(1, HEADS, 9, 4)
    torch.testing.assert_close(small.bias(q, on_grid(3, 3)[1]).whole(), wide.bias(q, on_grid(3, 3)[1]).whole())


def test_the_grid_bias_stands_in_any_model() -> None:
    """With rows before the grid, in a text, and token by token."""
    x, _ = on_grid(2, 3)
    flow = start_flow(torch.zeros(2, 8, 0))
    flow.grid = (2, 3)
    part = GridBias(HEADS, 2, 3).build()
    found = part.bias(torch.zeros(2, HEADS, 8, 4), flow).whole()
    assert found.shape == (1, HEADS, 8, 8)
    assert not found[:, :, :2].any()
    assert not found[:, :, :, :2].any()
    assert found[0, :, 2:, 2:].equal(part.bias(torch.zeros(2, HEADS, 6, 4), on_grid(2, 3)[1]).whole()[0])
    text = Attention.of_width(WIDTH, HEADS, Causal()).replace(position=GridBias(HEADS, 1, 4)).build()
    wanted = text(x, start_flow(x))
    cache, rows = GrowingCache(), []
    for piece in torch.split(x, [2, 1, 3], 1):
        rows.append(text(piece, start_flow(piece, cache=cache)))
        cache.length += piece.shape[1]
    torch.testing.assert_close(torch.cat(rows, 1), wanted)


def test_gradients_reach_the_table() -> None:
    part = Windows(attention(3), 3, 1).build().double()
    x, flow = on_grid(4, 5, batch=1)
    x = x.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda rows, table: _with_table(part, rows, table, flow), (x, part.op.position.weight)
    )


def _with_table(part: torch.nn.Module, rows: Tensor, table: Tensor, flow: Flow) -> Tensor:
    return torch.func.functional_call(part, {"op.position.weight": table}, (rows, flow))


def test_merging() -> None:
    part = PatchMerging(LayerNorm(4 * WIDTH, gain=False, bias=False), Linear(4 * WIDTH, 3, bias=False)).build()
    x, flow = on_grid(3, 5)
    found = part(x, flow)
    assert flow.grid == (2, 3)
    assert (flow.view.queries, flow.view.keys, flow.positions.tolist()) == (6, 6, [list(range(6))])
    grid = F.pad(x.view(2, 3, 5, WIDTH), (0, 0, 0, 1, 0, 1))
    four = torch.cat((grid[:, 2, 2], grid[:, 3, 2], grid[:, 2, 3], grid[:, 3, 3]), -1)
    torch.testing.assert_close(found[:, 4], F.layer_norm(four, (4 * WIDTH,)) @ part.project.weight.T)
    assert PatchMerging.of_width(WIDTH).build()(*on_grid(2, 2)).shape == (2, 1, 2 * WIDTH)


def test_a_pyramid_forgets_the_old_rows() -> None:
    """Masks, positions and shared tensors are those of the stage's own rows; slots are told apart."""
    block = Residual(Windows(attention(2), 2, 1), pre=LayerNorm(WIDTH))
    wide = Residual(Attention.of_width(2 * WIDTH, HEADS, Everyone()), pre=LayerNorm(2 * WIDTH))
    spec = Pyramid((Stack((block, block)), Stack((wide,))), (PatchMerging.of_width(WIDTH),), LayerNorm(2 * WIDTH))
    model = spec.build()
    x, flow = on_grid(5, 5)
    flow.trace, flow.path = Trace(), "encoder."
    assert model(x, flow).shape == (2, 9, 2 * WIDTH)
    assert flow.path == "encoder."
    assert {name: list(one.shape) for name, one in flow.trace.attention.items()} == {
        "encoder.0.0.op.op": [18, HEADS, 4, 4],
        "encoder.0.1.op.op": [18, HEADS, 4, 4],
        "encoder.1.0.op": [2, HEADS, 9, 9],
    }


def test_patches_are_a_convolution() -> None:
    spec = Patches((3, 2), 4, Linear(24, WIDTH))
    part = spec.build()
    assert isinstance(part, InputPart)
    images = torch.randn(2, 4, 9, 8)
    flow = part.begin(Given(images))
    assert flow.grid == (3, 4)
    wanted = F.conv2d(images, part.project.weight.view(WIDTH, 4, 3, 2), part.project.bias, stride=(3, 2))
    torch.testing.assert_close(part(images, flow), wanted.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(("edge", "grid"), [("crop", (2, 3)), ("pad", (3, 4))])
def test_what_is_left_over_at_the_edges(edge: str, grid: tuple[int, int]) -> None:
    spec = Patches((3, 2), 1, Linear(6, WIDTH))
    images = torch.randn(1, 1, 7, 7)
    part = spec.replace(edge=edge).build()
    flow = part.begin(Given(images))
    assert flow.grid == grid
    whole = torch.zeros(1, 1, 9, 8)
    whole[..., :7, :7] = images
    whole = whole[..., : grid[0] * 3, : grid[1] * 2]
    same = spec.build()
    same.load_state_dict(part.state_dict())
    torch.testing.assert_close(part(images, flow), same(whole, same.begin(Given(whole))))
    with pytest.raises(SpecError, match="7 x 7 pixels is not made of patches of 3 x 2"):
        same.begin(Given(images))


def test_tokens_stand_before_the_patches() -> None:
    spec = Patches((2, 2), 1, Linear(4, WIDTH), (Token(WIDTH), Token(WIDTH)), GridPositions(WIDTH, (2, 2), before=2))
    part = spec.build()
    images = torch.zeros(3, 1, 4, 4)
    with torch.no_grad():
        rows = part(images, part.begin(Given(images)))
    assert rows.shape == (3, 6, WIDTH)
    torch.testing.assert_close(rows[1, 1], part.tokens[1].weight + part.positions.weight[1])
    torch.testing.assert_close(rows[:, 2:], part.positions.weight[2:].expand(3, -1, -1))
    plain = spec.replace(positions=Learned(WIDTH, 6)).build()
    assert plain(images, plain.begin(Given(images))).shape == rows.shape
    endless = spec.replace(positions=Sinusoidal(WIDTH)).build()
    assert endless(images, endless.begin(Given(images))).shape == rows.shape


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (lambda: Windows(attention(3), 0), "window must be at least 1"),
        (lambda: Windows(attention(3), 3, 3), r"shift must be in \[0, 3\), not 3"),
        (lambda: Windows(Attention.of_width(WIDTH, HEADS, Everyone()), 3, 1), "must see SameDocument only"),
        (lambda: GridBias(HEADS, 0, 3), "at least 1"),
        (lambda: GridPositions(WIDTH, (0, 3)), "both sides of the grid"),
        (lambda: Patches((2, 2), 3, Linear(11, WIDTH)), "a patch has 12 values, but the projection takes 11"),
        (lambda: Pyramid((Stack((Linear(1, 1),)),) * 3, (Linear(1, 1),)), "3 stages need 2 merges"),
        (lambda: Token(0), "width"),
        (lambda: Stack((Linear(1, 1),), layerdrop=1.0), "layerdrop must be in"),
    ],
)
def test_what_can_not_be(spec: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        spec()  # type: ignore[operator]


def test_windows_need_a_grid() -> None:
    part = Windows(attention(3), 3).build()
    x = torch.zeros(2, 6, WIDTH)
    with pytest.raises(SpecError, match="6 rows are here, and no grid"):
        part(x, start_flow(x))
    flow = start_flow(x)
    flow.grid = (2, 2)
    with pytest.raises(SpecError, match="6 rows are here, and a grid of 2 x 2"):
        part(x, flow)
    flow = start_flow(x, torch.tensor([[1, 1, 1, 0, 0, 0]] * 2))
    flow.grid = (2, 3)
    with pytest.raises(SpecError, match="can't be padded"):
        part(x, flow)
    packed = start_flow(x, documents=torch.zeros(2, 6, dtype=torch.long))
    packed.grid = (2, 3)
    with pytest.raises(SpecError, match="PatchMerging can't be packed"):
        PatchMerging.of_width(WIDTH).build()(x, packed)
    with pytest.raises(SpecError, match="rows that are patches of an image"):
        GridPositions(WIDTH, (2, 3)).build()(x, start_flow(x))


def test_layers_are_dropped_in_training_only() -> None:
    part = Stack((Chain((Linear(WIDTH, WIDTH), Linear(WIDTH, WIDTH))),) * 2, layerdrop=0.5).build()
    x, flow = on_grid(1, 1, batch=1)
    torch.manual_seed(0)
    outcomes = {tuple(part(x, flow).flatten().tolist()) for _ in range(40)}
    assert len(outcomes) == 4  # both blocks, either, none
    part.eval()
    assert len({tuple(part(x, flow).flatten().tolist()) for _ in range(10)}) == 1


def test_heads_of_windows_share_keys() -> None:
    """Windows around grouped-query attention: the op is any op."""
    grouped = Attention.of_heads(WIDTH, Heads(4, 2, 2), SameDocument())
    x, flow = on_grid(4, 4)
    assert Windows(grouped, 2, 1).build()(x, flow).shape == x.shape
