"""LongMamba's filter against its formula, head by head and sample by sample."""

from __future__ import annotations

import math

import pytest
import torch

from hybridprune_megatron.method.dt_filter import filtered_steps
from hybridprune_megatron.method.layout import TokenLayout
from tests.method.layouts import layout_of

HEADS = 5


def steps_of(layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(layout.num_tokens)
    dt = torch.nn.functional.softplus(torch.randn(layout.num_tokens, HEADS, generator=generator) - 2)
    # Half-lives from far below to far above the lengths of the samples.
    return dt, -torch.logspace(-3, 4, HEADS)


def naive(dt, A, layout, share):
    result = dt.clone()
    starts = layout.visual_starts()
    for sample in range(len(layout.visual_counts)):
        visual = layout.visual_index[starts[sample] : starts[sample + 1]].tolist()
        for head in range(HEADS):
            total = share * sum(float(dt[token, head]) for token in visual)
            if not math.exp(float(A[head]) * total) > 0.05:
                continue
            filled = 0.0
            for token in sorted(visual, key=lambda token: -float(dt[token, head])):
                if filled >= total:
                    result[token, head] = 0.0
                filled += float(dt[token, head])
    return result


@pytest.mark.parametrize("share", [0.1, 0.25, 0.7])
@pytest.mark.parametrize("visual", [(1,), (17,), (40, 3, 0, 11)])
def test_filter_equals_its_formula(visual, share):
    layout = layout_of(*visual)
    dt, A = steps_of(layout)
    filtered = filtered_steps(dt, A, layout, share)
    assert torch.equal(filtered, naive(dt, A, layout, share))
    text = torch.ones(layout.num_tokens, dtype=torch.bool)
    text[layout.visual_index] = False
    assert torch.equal(filtered[text], dt[text])
    if visual == (40, 3, 0, 11):
        zeroed = (filtered == 0).any(0)
        assert zeroed[0], "a head with a long memory is filtered"
        assert not zeroed[-1], "a head with a short one is not"


def test_what_is_left_is_the_trained_total():
    layout = layout_of(400)
    dt, _ = steps_of(layout)
    filtered = filtered_steps(dt, torch.full((HEADS,), -1e-6), layout, 0.25)[layout.visual_index]
    wanted = 0.25 * dt[layout.visual_index].sum(0)
    assert ((filtered.sum(0) - wanted) >= 0).all()
    assert ((filtered.sum(0) - wanted) < dt.max()).all(), "off by less than a step"


def test_a_share_of_one_changes_nothing():
    layout = layout_of(12, 5)
    dt, A = steps_of(layout)
    assert torch.equal(filtered_steps(dt, A, layout, 1.0), dt)


def test_gradients_pass_where_a_step_is_left():
    layout = layout_of(12, 5)
    dt, A = steps_of(layout)
    dt.requires_grad_()
    filtered = filtered_steps(dt, A, layout, 0.3)
    filtered.sum().backward()
    assert torch.equal(dt.grad, (filtered != 0).float())
    assert (dt.grad == 0).any()
