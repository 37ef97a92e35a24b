"""The formulas of the query-conditioned scores: how much the question's tokens read from each visual token in a layer.

Shape letters: L tokens, V visual tokens, T query tokens, J keys of a block, H heads, K key-value heads, E head width,
G groups, R = H / G heads of a group, N state size. Equal tokens that the same rows see get the same score, bitwise
(``method.sums``), so that of them the earlier ones stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from hybridprune_megatron.method.signals import BLOCK, AttentionSignals, MambaSignals, ScoredSample
from hybridprune_megatron.method.sums import averaged, on_grid, summed

_ATTENTION = "tkre,jke->tjkr"


def attention_mass(
    signals: AttentionSignals, samples: Sequence[ScoredSample], causal: bool = True
) -> Iterator[tuple[Tensor, Tensor]]:
    """``mean_{i in T} softmax_j'(q_ih . k_j'h / sqrt(E))_j`` over the keys that row i sees, for every head.

    Two passes over the keys, O(T + L) kept: one finds each row's log-sum-exp, the other sums the normalised columns.
    Where ranks share the keys, each passes over its own and the log-sum-exps are joined in between.

    Args:
        signals: of one layer, this rank's heads.
        samples: whose tokens.
        causal: whether visual tokens after a row are hidden from it.

    Yields:
        int64 [J] rows of k in blocks, visual ones at least, and float32 [J, K, H / K] their mass; a head sums to at
        most 1 over all of a sample.
    """
    rows = [_AttentionRows(signals, sample, causal) for sample in samples]
    log_sums = [each.log_sum() for each in rows]
    if signals.held is not None and log_sums:
        # One message for all samples.
        log_sums = list(signals.held.total(torch.cat(log_sums)).split([len(each) for each in log_sums]))
    for each, log_sum in zip(rows, log_sums):
        for keys in signals.scored_keys(each.sample):
            yield keys, each.mass(keys, log_sum)


class _AttentionRows:
    """The logits of one sample's rows with the keys that are here; arguments as for ``attention_mass``."""

    def __init__(self, signals: AttentionSignals, sample: ScoredSample, causal: bool) -> None:
        self.signals, self.sample = signals, sample
        q = signals.q[sample.queries].float() * signals.q.shape[-1] ** -0.5
        # [T, K, H / K, E]
        self.q = q.unflatten(1, (signals.k.shape[1], -1))
        self.q_on_grid = on_grid(self.q)
        self.always_seen = torch.zeros(sample.last - sample.first, dtype=torch.bool, device=q.device)
        if not causal:
            self.always_seen[sample.visual - sample.first] = True

    def logits(self, keys: Tensor) -> Tensor:
        """[T, J, K, H / K] scaled products with rows of k; -inf where a query does not see the key."""
        return self._seen(keys, torch.einsum(_ATTENTION, self.q, self.signals.k[keys].float()))

    def log_sum(self) -> Tensor:
        """[T, 1, K, H / K], finite where all keys are here, for a query sees itself."""
        keys = self.signals.keys(self.sample)
        if not keys:
            return self.q.new_full((len(self.q), 1, *self.q.shape[1:3]), float("-inf"))
        return _log_sum(self.logits, keys)

    def mass(self, keys: Tensor, log_sum: Tensor) -> Tensor:
        """[J, K, H / K] mean over the rows of the softmax; equal for equal keys, unlike ``logits``."""
        products = torch.einsum(_ATTENTION, self.q_on_grid, on_grid(self.signals.k[keys])).float()
        return averaged(torch.exp(self._seen(keys, products) - log_sum), 0)

    def _seen(self, keys: Tensor, products: Tensor) -> Tensor:
        positions = self.signals.positions(keys)
        hidden = self.sample.after(positions) & ~self.always_seen[positions - self.sample.first]
        return products.masked_fill(hidden[:, :, None, None], float("-inf"))


def implicit_attention(
    signals: MambaSignals, sample: ScoredSample, decay: bool = False, dt: bool = True, function: str = "identity"
) -> Iterator[Tensor]:
    """``mean_{i in T} f(S_ijh)``, ``S_ijh = C_ig . B_jg [dt_jh] [1[i >= j] exp(a_ih - a_jh)]``, for every head h.

    ``a`` is the running sum of dt A over the sample, g the group of h. The softmax is over the visual tokens j; with
    decay, over those that row i sees. Without decay the identity collapses to one pass over B with the mean of C; all
    others take T x V x G products in blocks and keep their column sums.

    The identity without decay (its terms are float32) and everything with decay are summed in float64 and rounded when
    the heads are pooled, to the same bits here and in the native operators: one pass waits for B anyway, and decays
    span hundreds of orders of magnitude.

    Args:
        signals: B, C [L, G, N] after convolution and SiLU, dt [L, H] after softplus, A [H] < 0; this rank's heads.
        sample: whose tokens.
        decay: whether the second bracket is there.
        dt: whether the first bracket is there.
        function: f: "identity", "abs", "relu" or "softmax".

    Yields:
        float64 or float32 [J, G, R], the visual tokens in blocks.
    """
    if function == "identity" and not decay:
        groups = (signals.B.shape[1], -1)
        mean_c = averaged(signals.C[sample.rows].double(), 0).float()
        for block in sample.visual.split(BLOCK // 8):
            # A row is summed like any other of its length, and what float64 rounds is lost when scores become float32.
            products = (signals.B[block].float() * mean_c).sum(-1, keepdim=True, dtype=torch.float64)
            yield products * _steps(signals, block, dt).unflatten(-1, groups)
        return
    rows = _Products(signals, sample, decay, dt, function)
    blocks = sample.visual.split(BLOCK // 4)
    if function != "softmax":
        for block in blocks:
            yield averaged(rows.values(block), 0)
        return
    log_sum = _log_sum(rows.logits, blocks)
    # A row that sees no visual token has no mass to give.
    log_sum = log_sum.masked_fill(log_sum == float("-inf"), float("inf"))
    for block in blocks:
        yield averaged(torch.exp(rows.logits(block) - log_sum), 0)


def contrasted(blocks: Callable[[], Iterator[Tensor]]) -> Iterator[Tensor]:
    """``c_jh = |s_jh - mean_j s_jh| / std_j s_jh`` over the visual tokens j of one sample, for every head h.

    The signed scores of a Mamba head have an offset that all tokens share and a sign that other heads have the other
    way round, so their plain mean over heads says how common a token is, not how much it is asked for (docs/method.md).

    Two passes: one finds each head's mean and standard deviation (divided by V), the other measures against them;
    nothing but one block is kept. A head that scores all tokens alike says 0 of each.

    Args:
        blocks: starts a pass over the scores of one sample, float [J, heads...] in blocks.

    Yields:
        float64 [J, heads...], the same blocks.
    """
    # Moments are those of differences from the first token: it lies within sqrt(V) standard deviations of the mean, so
    # that an offset of all tokens costs no digits, and equal tokens differ by exactly 0.
    count, first, total, squares = 0, torch.zeros(0), torch.zeros(0), torch.zeros(0)
    for block in blocks():
        scores = block.double()
        if not count:
            first, total, squares = scores[:1], torch.zeros_like(scores[0]), torch.zeros_like(scores[0])
        gaps = scores - first
        count, total, squares = count + len(block), total + summed(gaps, 0), squares + summed(gaps * gaps, 0)
    if not count:
        return
    mean = total / count
    variance = squares / count - mean * mean
    scale = torch.where(variance > 0, variance.rsqrt(), 0.0)
    centre = first + mean
    for block in blocks():
        yield (block.double() - centre).abs() * scale


class _Products:
    """f(S) of all rows with a block of visual tokens; arguments as for ``implicit_attention``."""

    def __init__(self, signals: MambaSignals, sample: ScoredSample, decay: bool, dt: bool, function: str) -> None:
        self.signals, self.sample, self.dt, self.function = signals, sample, dt, function
        self.log_decay = sample.log_decay(signals) if decay else None
        # With decay no two places are alike, so rounding may depend on the place.
        self.taken = Tensor.double if decay else on_grid
        self.rows_c = self.taken(signals.C[sample.rows])

    def values(self, block: Tensor) -> Tensor:
        """[T or 1, J, G, R] f(S), for the softmax S; float64 with decay, else float32."""
        products = torch.einsum("tgn,jgn->tjg", self.rows_c, self.taken(self.signals.B[block])).unsqueeze(-1)
        # The weights are not negative, so f may come before them, once a group instead of once a head.
        products = _ELEMENTWISE[self.function](products)
        weights = _steps(self.signals, block, self.dt)
        if self.log_decay is not None:
            own = self.log_decay[self.sample.rows - self.sample.first].unsqueeze(1)
            gap = own - self.log_decay[block - self.sample.first]
            hidden = self.sample.after(block).unsqueeze(-1)
            weights = weights * gap.masked_fill(hidden, float("-inf")).exp()
        else:
            products = products.float()
            if self.function != "softmax":
                # The weights are then the same for all rows.
                products = averaged(products, 0).unsqueeze(0)
        return products * weights.unflatten(-1, (self.signals.B.shape[1], -1))

    def logits(self, block: Tensor) -> Tensor:
        """[T, J, G, R] for the softmax; -inf where a row does not see the token."""
        if self.log_decay is None:
            return self.values(block)
        return self.values(block).masked_fill(self.sample.after(block)[:, :, None, None], float("-inf"))


_ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda values: values,
    "softmax": lambda values: values,
    "abs": torch.abs,
    "relu": torch.relu,
}


def _steps(signals: MambaSignals, block: Tensor, dt: bool) -> Tensor:
    """float32 [J, H] step sizes, or ones."""
    steps = signals.dt[block].float()
    return steps if dt else torch.ones_like(steps)


def _log_sum(logits: Callable[[Tensor], Tensor], blocks: Sequence[Tensor]) -> Tensor:
    """[T, 1, heads] log-sum-exp over the second dimension of the logits of all blocks."""
    parts = [torch.logsumexp(logits(block), 1, keepdim=True) for block in blocks]
    return torch.logsumexp(torch.cat(parts, 1), 1, keepdim=True)
