"""Merging and the baselines that rank by similarity, against their formulas written out token by token."""

from __future__ import annotations

import pytest
import torch

from hybridprune_megatron.method import merge
from hybridprune_megatron.method.merge import group_means, most_similar, take_merged
from hybridprune_megatron.method.plan import select
from hybridprune_megatron.method.score_output import OutputNormScorer
from tests.method.layouts import layout_of

WIDTH = 7


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a @ b) / (a.norm() * b.norm()))


@pytest.mark.parametrize(("rows", "candidates"), [(1, 1), (9, 4), (21, 30), (0, 3)])
def test_most_similar_is_the_highest_cosine(rows, candidates, monkeypatch):
    # Blocks that divide neither side.
    monkeypatch.setattr(merge, "_BLOCK", 8)
    a, b = random(rows, WIDTH), random(candidates, WIDTH, seed=1)
    index, similarity = most_similar(a, b)
    for row in range(rows):
        cosines = [cosine(a[row], other) for other in b]
        assert index[row] == max(range(candidates), key=cosines.__getitem__)
        assert float(similarity[row]) == pytest.approx(max(cosines), abs=1e-6)


def test_most_similar_takes_the_first_of_equals_across_blocks(monkeypatch):
    monkeypatch.setattr(merge, "_BLOCK", 2)
    candidates = torch.tensor([[1.0, 0], [0, 1], [0, 2], [0, 3]])
    assert most_similar(torch.tensor([[0.0, 5.0]]), candidates)[0].tolist() == [1]


def test_most_similar_never_holds_all_pairs(monkeypatch):
    monkeypatch.setattr(merge, "_BLOCK", 4)
    largest = []
    plain = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: largest.append((len(a), b.shape[1])) or plain(a, b))
    most_similar(random(19, WIDTH), random(23, WIDTH))
    assert max(rows for rows, _ in largest) <= 4
    assert max(columns for _, columns in largest) <= 4


def test_group_means_and_their_gradient():
    values = random(9, 1, WIDTH).requires_grad_()
    group = torch.tensor([2, 0, 1, 2, 2, 0, 1, 3, 2])
    means = group_means(values, group, 4)
    for index in range(4):
        torch.testing.assert_close(means[index], values[group == index].mean(0))
    assert torch.equal(means[3], values[7]), "a group of one is bitwise its row"
    (means * random(4, 1, WIDTH, seed=1)).sum().backward()
    expected = random(4, 1, WIDTH, seed=1)[group] / torch.bincount(group)[group][:, None, None]
    torch.testing.assert_close(values.grad, expected)


def naive_take_merged(hidden, layout, plan, partner):
    """Every dropped token is added to its partner, token by token."""
    sample = torch.repeat_interleave(torch.arange(len(layout.sample_lengths)), torch.tensor(layout.sample_lengths))
    kept = set(plan.kept.tolist())
    groups = {token: [token] for token in plan.kept.tolist()}
    visual = layout.visual_index.tolist()
    for number, token in enumerate(visual):
        if token in kept:
            continue
        if partner is None:
            choices = [other for other in visual if other in kept and sample[other] == sample[token]]
            into = max(choices, key=lambda other, token=token: cosine(hidden[token, 0], hidden[other, 0]))
        else:
            into = visual[partner[number]]
        groups[into].append(token)
    return torch.stack([torch.stack([hidden[each] for each in groups[token]]).mean(0) for token in sorted(groups)])


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("visual", "counts"), [((11,), (3,)), ((9, 1, 0, 13), (4, 1, 0, 1)), ((6, 5), (6, 2))])
def test_merging_averages_each_dropped_token_into_one_that_stays(visual, counts, given):
    layout = layout_of(*visual)
    total = sum(visual)
    hidden = random(layout.num_tokens, 1, WIDTH, seed=total)
    plan = select(random(total, seed=1), layout, counts)
    partner = None
    if given:
        # The first kept token of each sample.
        first = torch.searchsorted(plan.kept, layout.visual_index)
        is_kept = plan.kept[first.clamp(max=len(plan.kept) - 1)] == layout.visual_index
        firsts = [
            start + int(part.int().argmax())
            for start, part in zip(layout.visual_starts(), is_kept.split(visual))
            if len(part)
        ]
        partner = torch.cat([torch.full((n,), at) for at, n in zip(firsts, [n for n in visual if n])])
    merged = take_merged(hidden, layout, plan, partner)
    torch.testing.assert_close(merged, naive_take_merged(hidden, layout, plan, partner))
    text = torch.ones(len(merged), dtype=torch.bool)
    text[plan.layout.visual_index] = False
    assert torch.equal(merged[text], plan.take(hidden)[text]), "text is not touched"


def test_gradients_reach_dropped_tokens_too():
    layout = layout_of(8, 3)
    hidden = random(layout.num_tokens, 1, WIDTH).requires_grad_()
    plan = select(random(11), layout, (2, 1))
    take_merged(hidden, layout, plan).sum().backward()
    assert (hidden.grad.abs().sum((1, 2)) > 0).all()
    # Sums to the number of rows left: every mean hands out weights that add up to one.
    torch.testing.assert_close(hidden.grad.sum(), torch.tensor(float(WIDTH * len(plan.kept))))


def naive_utrc(hidden, layout, counts):
    """Kept visual positions and (dropped, into) pairs, by the paper's steps."""
    kept, pairs = [], {}
    starts = layout.visual_starts()
    for sample, (present, count) in enumerate(zip(layout.visual_counts, counts)):
        tokens = layout.visual_index[starts[sample] : starts[sample + 1]].tolist()
        drop = present - count
        by_importance = sorted(tokens, key=lambda token: -float(hidden[token].clamp(min=0).mean()))
        less = max(present // 2, drop) if drop else 0
        strong, weak = by_importance[: present - less], by_importance[present - less :]
        match = {
            token: max(strong, key=lambda other, token=token: cosine(hidden[token], hidden[other])) for token in weak
        }
        gone = sorted(weak, key=lambda token: -cosine(hidden[token], hidden[match[token]]))[:drop]
        kept += sorted(set(tokens) - set(gone))
        pairs |= {token: match[token] for token in gone}
    return kept, pairs


@pytest.mark.parametrize(
    ("visual", "counts"), [((10,), (7,)), ((11,), (2,)), ((9, 0, 13, 4), (5, 0, 12, 1)), ((5, 6), (5, 3)), ((2,), (1,))]
)
def test_utrc_equals_its_formula(visual, counts):
    layout = layout_of(*visual)
    hidden = random(layout.num_tokens, WIDTH, seed=sum(visual))
    ranking = OutputNormScorer().rank(hidden, layout, counts)
    plan = select(ranking.scores, layout, counts)
    kept, pairs = naive_utrc(hidden, layout, counts)
    visual_kept = plan.layout.origin[plan.layout.visual_index]
    assert visual_kept.tolist() == kept
    positions = layout.visual_index.tolist()
    assert {token: positions[ranking.partner[positions.index(token)]] for token in pairs} == pairs


def test_utrc_looks_at_its_own_sample_only():
    hidden = random(layout_of(9, 7).num_tokens, WIDTH)
    both = OutputNormScorer().rank(hidden, layout_of(9, 7), (4, 3))
    alone = OutputNormScorer().rank(hidden[: 9 + 5], layout_of(9), (4,))
    assert torch.equal(both.scores[:9], alone.scores)
    assert torch.equal(both.partner[:9], alone.partner)
