"""What ``bench.py`` measures: inputs, the call, the torch a user would write, and the bytes that must move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.method.layout import SampleLayout, Span, TokenKind, TokenLayout
from hybridprune_megatron.method.plan import Plan, chosen_visual, select
from hybridprune_megatron.method.score_query import QueryScorer
from hybridprune_megatron.method.signals import AttentionSignals, MambaSignals

# What stays of the visual tokens.
KEPT = 4


@dataclass(frozen=True)
class Sizes:
    """One sample of visual tokens and a question after them, and one layer's widths."""

    length: int
    question: int
    hidden: int
    heads: int
    key_heads: int
    width: int
    mamba_heads: int
    groups: int
    state: int
    device: torch.device
    dtype: torch.dtype

    @property
    def visual(self) -> int:
        return self.length - self.question

    @property
    def kept(self) -> int:
        return self.visual // KEPT

    @property
    def bytes_each(self) -> int:
        return self.dtype.itemsize

    def randn(self, *shape: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        return torch.randn(*shape, generator=generator, device=self.device).to(self.dtype)

    def layout(self) -> TokenLayout:
        spans = (Span(TokenKind.FRAME, self.visual, 0, 0), Span(TokenKind.QUESTION, self.question))
        return TokenLayout.from_samples([SampleLayout(spans)], self.device)


@dataclass(frozen=True)
class Case:
    """One operator.

    Attributes:
        inputs: made once.
        run: through the project's own code, native or plain by the switch.
        unfused: what a user would write without either.
        num_bytes: read and written at least.
        unfused_bytes: largest temporary of ``unfused``.
        tolerance: largest difference of native and plain, relative to the largest value; 0: to the bit.
    """

    name: str
    inputs: Callable[[Sizes], Any]
    run: Callable[[Any], Tensor]
    unfused: Callable[[Any], Tensor]
    num_bytes: Callable[[Sizes], int]
    unfused_bytes: Callable[[Sizes], int]
    tolerance: float = 1e-4


def attention_inputs(sizes: Sizes) -> tuple[AttentionSignals, TokenLayout]:
    q = sizes.randn(sizes.question, sizes.heads, sizes.width)
    return AttentionSignals(q, sizes.randn(sizes.length, sizes.key_heads, sizes.width)), sizes.layout()


def unfused_attention(inputs: tuple[AttentionSignals, TokenLayout]) -> Tensor:
    """The whole softmax matrix, every row of which sees all visual tokens and the question up to itself."""
    signals, layout = inputs
    k = signals.k.repeat_interleave(signals.q.shape[1] // signals.k.shape[1], 1)
    logits = torch.einsum("the,jhe->htj", signals.q, k).float() * signals.q.shape[-1] ** -0.5
    hidden = torch.arange(len(k), device=k.device) > layout.query_index.unsqueeze(1)
    return logits.masked_fill(hidden, float("-inf")).softmax(-1).mean((0, 1))[layout.visual_index]


def mamba_inputs(sizes: Sizes) -> tuple[MambaSignals, TokenLayout]:
    B = sizes.randn(sizes.length, sizes.groups, sizes.state)
    dt = torch.nn.functional.softplus(sizes.randn(sizes.length, sizes.mamba_heads).float() - 3)
    rate = -torch.ones(sizes.mamba_heads, device=sizes.device)
    return MambaSignals(B, B.flip(0).contiguous() * sizes.state**-0.5, dt, rate), sizes.layout()


def unfused_products(inputs: tuple[MambaSignals, TokenLayout]) -> Tensor:
    """[T, V, H] implicit attention."""
    signals, layout = inputs
    B, C = signals.B[layout.visual_index].float(), signals.C[layout.query_index].float()
    products = torch.einsum("tgn,jgn->tjg", C, B)
    heads_of_group = signals.dt.shape[1] // B.shape[1]
    return products.repeat_interleave(heads_of_group, 2) * signals.dt[layout.visual_index]


def unfused_contrast(inputs: tuple[MambaSignals, TokenLayout]) -> Tensor:
    scores = unfused_products(inputs).mean(0)
    return ((scores - scores.mean(0)).abs() / scores.std(0, correction=0)).mean(1)


def mamba_bytes(sizes: Sizes) -> int:
    channels = sizes.groups * sizes.state
    read = (sizes.visual + sizes.question) * channels * sizes.bytes_each + sizes.visual * sizes.mamba_heads * 4
    return read + sizes.visual * (4 + 8)


def mamba_case(name: str, scorer: QueryScorer, unfused: Callable[[Any], Tensor], passes: int) -> Case:
    return Case(
        name,
        mamba_inputs,
        lambda inputs: scorer.score(*inputs, 0),
        unfused,
        lambda sizes: passes * mamba_bytes(sizes),
        lambda sizes: 3 * 4 * sizes.question * sizes.visual * sizes.mamba_heads,
    )


def select_inputs(sizes: Sizes) -> tuple[Tensor, TokenLayout, int]:
    return sizes.randn(sizes.visual).float(), sizes.layout(), sizes.kept


def chosen(inputs: tuple[Tensor, TokenLayout, int]) -> Tensor:
    scores, layout, kept = inputs
    return chosen_visual(scores, layout.visual_frame, [(len(scores), kept)], 0)


def unfused_select(inputs: tuple[Tensor, TokenLayout, int]) -> Tensor:
    """Ties as they come."""
    scores, _, kept = inputs
    return scores.topk(kept).indices.sort().values


def gather_inputs(sizes: Sizes) -> tuple[Tensor, Plan]:
    hidden = sizes.randn(sizes.length, 1, sizes.hidden)
    scores, layout, kept = select_inputs(sizes)
    return hidden, select(scores, layout, [kept])


def gather_backward(inputs: tuple[Tensor, Plan], take: Callable[[Tensor, Plan], Tensor]) -> Tensor:
    hidden = inputs[0].detach().requires_grad_()
    taken = take(hidden, inputs[1])
    return torch.autograd.grad(taken, hidden, taken.detach())[0]


def row_bytes(sizes: Sizes, *numbers: int) -> int:
    return sum(numbers) * sizes.hidden * sizes.bytes_each


def taken_rows(sizes: Sizes) -> int:
    return sizes.kept + sizes.question


CASES = [
    Case(
        "attention score",
        attention_inputs,
        lambda inputs: QueryScorer().score(*inputs, 0),
        unfused_attention,
        lambda sizes: (
            2 * (sizes.length * sizes.key_heads + sizes.question * sizes.heads) * sizes.width * sizes.bytes_each
            + sizes.visual * 4
        ),
        lambda sizes: 3 * 4 * sizes.question * sizes.length * sizes.heads,
    ),
    mamba_case("Mamba score", QueryScorer(), unfused_contrast, 2),
    mamba_case(
        "Mamba score, signed",
        QueryScorer(mamba_contrast=False),
        lambda inputs: unfused_products(inputs).mean((0, 2)),
        1,
    ),
    mamba_case(
        "Mamba score, softmax",
        QueryScorer(mamba_function="softmax", mamba_contrast=False),
        lambda inputs: unfused_products(inputs).softmax(1).mean((0, 2)),
        2,
    ),
    mamba_case(
        "Mamba score, abs",
        QueryScorer(mamba_function="abs", mamba_contrast=False),
        lambda inputs: unfused_products(inputs).abs().mean((0, 2)),
        1,
    ),
    Case(
        "select",
        select_inputs,
        chosen,
        unfused_select,
        lambda sizes: sizes.visual * 4 + sizes.kept * 8,
        lambda sizes: 8 * sizes.visual,
        0.0,
    ),
    Case(
        "gather",
        gather_inputs,
        lambda inputs: inputs[1].take(inputs[0]),
        lambda inputs: inputs[0][inputs[1].kept],
        lambda sizes: row_bytes(sizes, 2 * taken_rows(sizes)),
        lambda sizes: row_bytes(sizes, taken_rows(sizes)),
        0.0,
    ),
    Case(
        "gather and its gradient",
        gather_inputs,
        lambda inputs: gather_backward(inputs, lambda hidden, plan: plan.take(hidden)),
        lambda inputs: gather_backward(inputs, lambda hidden, plan: hidden[plan.kept]),
        lambda sizes: row_bytes(sizes, 3 * taken_rows(sizes), sizes.length),
        lambda sizes: row_bytes(sizes, sizes.length),
        0.0,
    ),
]
