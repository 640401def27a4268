"""Convolutions and what stands around them: against PyTorch's, and padding that is never heard."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polyformer.errors import SpecError
from polyformer.parts import (
    Activate,
    Attention,
    Causal,
    Chain,
    ChannelNorm,
    Convolution,
    DropPath,
    Everyone,
    Frames,
    GatedConvolution,
    Idle,
    Linear,
    MaskedSpans,
    Part,
    Rotary,
    Sinusoidal,
    Table,
    TransformerXL,
    Turned,
)
from polyformer.parts.flow import Flow, GrowingCache, start_flow
from polyformer.parts.inputs import Given, InputPart

WIDTH = 6
STEM = Chain((Convolution(1, 4, 5, stride=3), ChannelNorm(4), Activate("gelu"), Convolution(4, WIDTH, 3, 2, padding=1)))


def masked(lengths: list[int], room: int) -> Tensor:
    return (torch.arange(room) < torch.tensor(lengths)[:, None]).long()


@pytest.mark.parametrize(
    "spec",
    [
        Convolution(4, 6, 3),
        Convolution(4, 6, 3, stride=2, padding=1),
        Convolution(4, 4, 5, padding=2, groups=4, bias=False),
        Convolution(4, 8, 1, stride=3, groups=2),
    ],
)
def test_pytorch_s_convolution(spec: Convolution) -> None:
    part = spec.build()
    x = torch.randn(2, 11, 4)
    flow = start_flow(x)
    found = part(x, flow)
    options = {"stride": spec.stride, "padding": spec.padding, "groups": spec.groups, "bias": spec.bias}
    theirs = nn.Conv1d(spec.inputs, spec.outputs, spec.kernel, **options)
    theirs.load_state_dict(part.state_dict())
    torch.testing.assert_close(found, theirs(x.transpose(1, 2)).transpose(1, 2))
    assert flow.view.queries == flow.positions.shape[1] == found.shape[1]


def test_one_group_to_a_channel() -> None:
    part = ChannelNorm(4, eps=1e-3).build()
    x = torch.randn(3, 7, 4)
    with torch.no_grad():
        part.weight.normal_()
        part.bias.normal_()
    wanted = F.group_norm(x.transpose(1, 2), 4, part.weight, part.bias, 1e-3).transpose(1, 2)
    torch.testing.assert_close(part(x, start_flow(x)), wanted)
    padded = torch.cat((x, torch.full((3, 2, 4), 9.0)), 1)
    torch.testing.assert_close(part(padded, start_flow(padded, masked([7] * 3, 9)))[:, :7], wanted)


@pytest.mark.parametrize("lengths", [[40, 23, 7], [40, 40, 40], [17, 5, 40]], ids=str)
def test_padded_sound_is_what_it_is_alone(lengths: list[int]) -> None:
    """Through convolutions with and without a stride, norms over time and the module of Conformer."""
    model = nn.ModuleList(
        [Frames(STEM, positions=Sinusoidal(WIDTH)).build(), GatedConvolution.of_width(WIDTH, 5).build()]
    )
    model.eval()
    source, gated = model
    assert isinstance(source, InputPart)
    sound = torch.randn(3, 40)

    def rows(sound: Tensor, mask: Tensor | None) -> tuple[Tensor, Flow]:
        flow = source.begin(Given(sound, mask))
        x = source(sound, flow)
        return x + gated(x, flow), flow

    together, flow = rows(sound.masked_fill(masked(lengths, 40) == 0, 7.0), masked(lengths, 40))
    for i, length in enumerate(lengths):
        alone, own = rows(sound[i : i + 1, :length], None)
        assert own.view.valid is None
        count = alone.shape[1] if flow.rows_valid is None else int(flow.rows_valid[i].sum())
        assert count == alone.shape[1]
        torch.testing.assert_close(together[i, :count], alone[0], atol=1e-5, rtol=1e-4)


def test_batch_statistics_leave_padding_out() -> None:
    """What stands in padded rows changes neither the statistics of a batch nor the running ones."""
    x = torch.randn(2, 9, WIDTH)
    found = []
    for filling in (0.0, 9.0):
        torch.manual_seed(3)
        part = GatedConvolution.of_width(WIDTH, 3).build().train()
        padded = x.masked_fill(masked([9, 4], 9)[..., None] == 0, filling)
        rows = part(padded, start_flow(padded, masked([9, 4], 9)))[masked([9, 4], 9).bool()]
        found.append((rows, *(buffer.clone() for buffer in part.buffers())))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_conformer_s_module() -> None:
    part = GatedConvolution.of_width(WIDTH, 3).build().eval()
    x = torch.randn(2, 9, WIDTH)
    assert isinstance(part.norm, Part)
    with torch.no_grad():
        part.norm.running_mean.normal_()
        first, second = (x @ part.up.weight.T).chunk(2, -1)
        y = (first * torch.sigmoid(second)).transpose(1, 2)
        y = F.conv1d(y, part.depthwise.weight, padding=1, groups=WIDTH)
        y = F.batch_norm(y, part.norm.running_mean, part.norm.running_variance, part.norm.weight, part.norm.bias)
        wanted = F.silu(y).transpose(1, 2) @ part.down.weight.T
        torch.testing.assert_close(part(x, start_flow(x)), wanted, atol=1e-6, rtol=1e-5)


class TestTransformerXL:
    def test_the_paper_s_four_terms(self) -> None:
        heads, width, length = 2, 8, 5
        spec = Attention.of_width(width, heads, Everyone())
        part = spec.replace(position=TransformerXL.of_width(width, heads)).build()
        place, x = part.position, torch.randn(1, length, width)
        with torch.no_grad():
            q, k = (getattr(part, name)(x)[0].view(length, heads, 4) for name in "qk")
            v = part.v(x)[0].view(length, heads, 4)
            rows = torch.zeros(length, heads, 4)
            for h in range(heads):
                for i in range(length):
                    scores = []
                    for j in range(length):
                        angle = (i - j) * 10000 ** (-torch.arange(4) * 2 / width)
                        waves = torch.stack((angle.sin(), angle.cos()), -1).flatten()
                        r = (place.project.weight @ waves).view(heads, 4)[h]
                        scores.append((q[i, h] + place.content[h]) @ k[j, h] + (q[i, h] + place.distance[h]) @ r)
                    rows[i, h] = torch.softmax(torch.stack(scores) / 2.0, 0) @ v[:, h]
            torch.testing.assert_close(part(x, start_flow(x))[0], part.o(rows.flatten(1)), atol=1e-5, rtol=1e-4)

    def test_token_by_token(self) -> None:
        part = Attention.of_width(8, 2, Causal()).replace(position=TransformerXL.of_width(8, 2)).build()
        x = torch.randn(2, 6, 8)
        cache, rows = GrowingCache(), []
        for piece in torch.split(x, [1, 3, 2], 1):
            rows.append(part(piece, start_flow(piece, cache=cache)))
            cache.length += piece.shape[1]
        torch.testing.assert_close(torch.cat(rows, 1), part(x, start_flow(x)))


def test_rows_are_turned_as_queries_are() -> None:
    part, rotary = Turned(Rotary(4), 2).build(), Rotary(4).build()
    x = torch.randn(2, 5, 8)
    wanted = rotary.turn(x.view(2, 5, 2, 4).transpose(1, 2), start_flow(x))
    torch.testing.assert_close(part(x, start_flow(x)), wanted.transpose(1, 2).flatten(2))


class TestMaskedSpans:
    def test_nothing_in_evaluation(self) -> None:
        part = MaskedSpans(WIDTH, 0.5, 3, channel_rate=0.5, channel_length=2).build().eval()
        x = torch.randn(2, 20, WIDTH)
        assert part(x, start_flow(x)) is x

    def test_spans_of_real_rows(self) -> None:
        part = MaskedSpans(WIDTH, 0.6, 4).build().train()
        x = torch.randn(64, 30, WIDTH)
        lengths = [30] * 32 + [10] * 31 + [2]
        out = part(x, start_flow(x, masked(lengths, 30)))
        hidden = (out == part.weight).all(-1)
        assert out[~hidden].equal(x[~hidden])
        assert not (hidden & (masked(lengths, 30) == 0)).any()
        assert not hidden[63].any()  # shorter than a span
        runs = [len(run) for row in hidden.tolist() for run in "".join("x" if one else " " for one in row).split()]
        assert min(runs) >= 4
        share = float(hidden[:32].float().mean())
        assert 0.35 < share < 0.6  # spans overlap

    def test_spans_of_channels(self) -> None:
        part = MaskedSpans(40, 0.0, channel_rate=0.3, channel_length=5).build().train()
        x = torch.rand(50, 3, 40) + 1
        hidden = part(x, start_flow(x)) == 0
        assert (hidden.all(1) == hidden.any(1)).all()
        assert 0.15 < float(hidden.float().mean()) < 0.4

    def test_the_seed_decides(self) -> None:
        part = MaskedSpans(WIDTH, 0.5, 3).build().train()
        x = torch.randn(2, 20, WIDTH)
        outcomes = []
        for _ in range(2):
            torch.manual_seed(5)
            outcomes.append(part(x, start_flow(x)))
        assert outcomes[0].equal(outcomes[1])


def test_idle_tensors_are_kept_and_not_trained() -> None:
    part = Idle(((2, 3), ()), "counts").build(dtype=torch.bfloat16)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in part.state_dict().items()} == {
        "tensor_0": ((2, 3), torch.long),
        "tensor_1": ((), torch.long),
    }
    assert Idle(((2,),)).build(dtype=torch.bfloat16).state_dict()["tensor_0"].dtype == torch.bfloat16
    assert not list(part.parameters())
    x = torch.randn(2, 3)
    assert part(x, None) is x


def test_a_table_holds_its_sinusoids() -> None:
    part, free = (
        Table(6, 9, layout="halves", spacing="ends").build(),
        Sinusoidal(6, layout="halves", spacing="ends").build(),
    )
    x = torch.zeros(1, 9, 6)
    assert part(x, start_flow(x)).equal(free(x, start_flow(x)))
    assert list(part.state_dict()) == ["weight"]
    assert not list(part.parameters())
    with pytest.raises(SpecError, match="10 tokens is longer than the model's 9"):
        part(torch.zeros(1, 10, 6), start_flow(torch.zeros(1, 10, 6)))


def test_whole_branches_are_dropped() -> None:
    part = DropPath(0.25).build().train()
    x = torch.ones(4000, 3, 2)
    out = part(x, None)
    kept = (out != 0).all((1, 2))
    assert (kept == (out != 0).any(2).any(1)).all()
    assert float(kept.float().mean()) == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(out[kept], x[kept] / 0.75)
    assert part.eval()(x, None) is x


def test_what_is_no_sound() -> None:
    source = Frames(STEM).build()
    spectrum = Frames(Convolution(5, WIDTH, 3), 5, padding="heard").build()
    assert isinstance(source, InputPart)
    assert isinstance(spectrum, InputPart)
    with pytest.raises(
        SpecError, match=r"input_values is of torch.float32 and shape \[2, 5, 9\]; .* \[batch, samples\]"
    ):
        source.begin(Given(torch.zeros(2, 5, 9)))
    with pytest.raises(SpecError, match=r"shape \[2, 4, 9\]; this model needs floats \[batch, 5, frames\]"):
        spectrum.begin(Given(torch.zeros(2, 4, 9)))
    with pytest.raises(SpecError, match=r"torch\.int64"):
        source.begin(Given(torch.zeros(2, 9, dtype=torch.long)))
    with pytest.raises(SpecError, match="takes no attention mask"):
        spectrum.begin(Given(torch.zeros(2, 5, 9), torch.ones(2, 9)))
    with pytest.raises(SpecError, match=r"attention mask has shape \[2, 8\]; 2 rows of 9 tokens"):
        source.begin(Given(torch.zeros(2, 9), torch.ones(2, 8)))
    left = torch.zeros(2, 30)
    with pytest.raises(SpecError, match="Convolution can't be padded on the left"):
        source(left, source.begin(Given(left, 1 - masked([3, 3], 30))))
    short = torch.zeros(2, 4)
    with pytest.raises(SpecError, match="4 rows are too few for a convolution over 5"):
        source(short, source.begin(Given(short)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Convolution(4, 6, 3, groups=3), "3 groups can't share 4 inputs and 6 outputs"),
        (lambda: Convolution(4, 6, 0), "at least 1"),
        (lambda: Convolution(4, 6, 3, padding=3), "not within the kernel"),
        (lambda: GatedConvolution.of_width(8, 4), "a depthwise kernel of 4 has no middle"),
        (lambda: MaskedSpans(8, 1.5), "rates must be between"),
        (lambda: Table(6), "needs a length"),
        (lambda: TransformerXL(2, 4, 7, Linear(7, 8)), "width must be even"),
        (lambda: Turned(Rotary(4), 0), "heads"),
        (lambda: DropPath(1.0), r"rate must be in \[0, 1\)"),
        (lambda: Idle(((0,),)), "at least 1"),
        (lambda: Frames(Linear(1, 1), 0), "channels must be at least 1"),
    ],
)
def test_what_can_not_be(make: object, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make()  # type: ignore[operator]
