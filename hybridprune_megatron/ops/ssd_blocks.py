"""The chunked SSD scan with its own backward, worked off in blocks of chunks.

A block is as many chunks as keep the decays, one Q x Q matrix a chunk and head, in a core's cache: on a CPU it is
passes over them that cost, not the matrix products. Backward computes them again, so nothing L x Q is stored.

Shape letters: L tokens, n chunks of a block, Q tokens a chunk, G groups, R heads a group, P head width, N state size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from hybridprune_megatron.ops.native import native_on_cpu

# Elements of the decays of a block: 2 MiB in float32.
_BLOCK_ELEMENTS = 1 << 19
# exp(-60) is 1e-26, nothing beside the 1 of a token's own step. Where exp underflows, a CPU takes fifty times as long.
_MIN_LOG_DECAY = -60.0


class ChunkedScan(torch.autograd.Function):
    """y [L, G, R, P] of the scan.

    Takes x [L, G, R, P], dt [L, G, R], A [G, R], B and C [L, G, N], D [G, R], all of one floating dtype, sample_index
    [L] and the chunk size.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, sample_index: Tensor, chunk: int
    ) -> Tensor:
        ctx.chunk = chunk
        ops = native_on_cpu(x)
        if ops is not None:
            y, all_states = ops.ssd_scan(x, dt, A, B, C, D, sample_index, chunk)
            counts = [-(-(tokens.stop - tokens.start) // size) for tokens, size in _blocks(dt, chunk)]
            starts = [0, *accumulate(counts)]
            states = [all_states[first : last + 1] for first, last in pairwise(starts)]
            ctx.save_for_backward(x, dt, A, B, C, D, sample_index, *states)
            return y
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        state = x.new_zeros(*x.shape[1:], B.shape[2])
        states = []
        for tokens, size in _blocks(dt, chunk):
            block = _Block(x, dt, A, B, C, sample_index, tokens, size)
            states.append(block.states(state))
            state = states[-1][-1]
            block.write_output(states[-1], D, y)
        ctx.save_for_backward(x, dt, A, B, C, D, sample_index, *states)
        return y

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, D, sample_index, *states = ctx.saved_tensors
        grad_x, grad_dt, grad_B, grad_C = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, dt, B, C)
        )
        grad_A, grad_D = torch.zeros_like(A), torch.zeros_like(D)
        grad_state = torch.zeros_like(states[-1][-1])
        for (tokens, size), block_states in reversed(list(zip(_blocks(dt, ctx.chunk), states))):
            block = _Block(x, dt, A, B, C, sample_index, tokens, size)
            grad_yb = block.cut(grad_y)
            grad_state, grad_step, read, across = block.backward(block_states, grad_state, grad_yb, grad_B, grad_C)
            skipped = (grad_yb * block.x).sum(-1)
            written = (grad_step * block.x).sum(-1)
            # A token's decay acts on every pair of a writer before it and a reader from it on: all that is read from
            # it to the chunk's end, less what was written there, and what lives on beyond the end.
            grad_log_decay = (read - written * block.dt).flip(1).cumsum(1).flip(1) + across.unsqueeze(1)
            torch.addcmul(written, grad_log_decay, A, out=block.cut(grad_dt))
            grad_A += (grad_log_decay * block.dt).sum((0, 1))
            grad_D += skipped.sum((0, 1))
            torch.mul(grad_yb, D.unsqueeze(-1), out=block.cut(grad_x))
            block.cut(grad_x).addcmul_(grad_step, block.dt.unsqueeze(-1))
        return grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, None, None


def _blocks(dt: Tensor, chunk: int) -> Iterator[tuple[slice, int]]:
    """Tokens of every block and the size of its chunks; what whole chunks leave over is one shorter chunk."""
    length, heads = dt.shape[0], dt[0].numel()
    whole = length - length % chunk
    step = chunk * max(1, _BLOCK_ELEMENTS // (heads * chunk * chunk))
    for start in range(0, whole, step):
        yield slice(start, min(start + step, whole)), chunk
    if whole < length:
        yield slice(whole, length), length - whole


class _Block:
    """Inputs of n chunks of Q tokens, their decays and sample masks.

    Heads of a group share B and C, so what they do with states is one matrix product with R * P rows or columns.
    """

    def __init__(
        self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, sample_index: Tensor, tokens: slice, size: int
    ) -> None:
        self.tokens, self.size = tokens, size
        self.x, self.dt, self.sample = self.cut(x), self.cut(dt), self.cut(sample_index)
        # [n * G, Q, N]
        self.B, self.C = (self.cut(t).transpose(1, 2).reshape(-1, size, t.shape[2]) for t in (B, C))
        # [n, Q, G, R]; short sums, so that they stay exact.
        self.log_decay = torch.cumsum(self.dt * A, 1)
        last = self.sample[:, -1:]
        # The sample whose state enters a chunk; what enters the first is zero.
        enters = torch.cat([sample_index[max(tokens.start - 1, 0)].view(1, 1), last[:-1]])
        # [n, Q, G, R] decay of the entering state at each token, 0 where the token belongs to a later sample.
        self.from_start = _exp(self.log_decay) * (self.sample == enters)[..., None, None]
        # [n, Q, G, R] decay at the chunk's end of what each token wrote, 0 for samples that have ended before it.
        self.to_end = _exp(self.log_decay[:, -1:] - self.log_decay) * (self.sample == last)[..., None, None]
        # [n, G, R, 1, 1] decay of the entering state over the chunk, 0 if its sample ends in it.
        self.through = self.from_start[:, -1, :, :, None, None]

    def cut(self, values: Tensor) -> Tensor:
        """[L, ...] -> [n, Q, ...], a view."""
        return values[self.tokens].unflatten(0, (-1, self.size))

    def states(self, state: Tensor) -> Tensor:
        """[n + 1, G, R, P, N]: the state [G, R, P, N] that enters the block and those after each of its chunks."""
        written = torch.bmm(self._by_group(self.x, self.dt * self.to_end).mT, self.B).view(-1, *state.shape)
        states = state.new_empty(len(written) + 1, *state.shape)
        states[0] = state
        for chunk, decay in enumerate(self.through):
            torch.addcmul(written[chunk], states[chunk], decay, out=states[chunk + 1])
        return states

    def write_output(self, states: Tensor, D: Tensor, y: Tensor) -> None:
        """Writes this block's part of y [L, G, R, P], given its states."""
        decay, products, _ = self._within()
        # Inside a chunk: y_i += sum_{j <= i, same sample} (C_i . B_j) exp(a_i - a_j) dt_j x_j
        mixing = decay.mul_(products.unsqueeze(2)).flatten(0, 2)
        inside = torch.bmm(mixing, self._by_head(self.x, self.dt.unsqueeze(-1)))
        # From earlier chunks: y_i += exp(a_i) C_i . h, where h is the state that entered the chunk.
        from_state = torch.bmm(self.C, states[:-1].flatten(2, 3).flatten(0, 1).mT)
        out = self.cut(y)
        torch.mul(self.x, D.unsqueeze(-1), out=out)
        out.add_(self._from_heads(inside))
        out.addcmul_(self._from_groups(from_state), self.from_start.unsqueeze(-1))

    def backward(
        self, states: Tensor, grad_state: Tensor, grad_y: Tensor, grad_B: Tensor, grad_C: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gradients of a block.

        Args:
            states: what ``states`` gave.
            grad_state: [G, R, P, N] of the state after the block.
            grad_y: [n, Q, G, R, P].
            grad_B: [L, G, N], written where the block is.
            grad_C: likewise.

        Returns:
            Gradients of the state that enters [G, R, P, N] and of dt * x [n, Q, G, R, P]; the change of the loss with
            the logarithm of what each token reads [n, Q, G, R] and of the state after each chunk [n, G, R].
        """
        # States: y_i += from_start_i C_i . h and h' = through h + sum_j to_end_j dt_j x_j B_j^T.
        grad_read = self._by_group(grad_y, self.from_start)
        grad_Cb = torch.bmm(grad_read, states[:-1].flatten(2, 3).flatten(0, 1))
        grad_entering = torch.bmm(grad_read.mT, self.C).view(-1, *grad_state.shape)
        grads = torch.empty_like(states)
        grads[-1] = grad_state
        for chunk in reversed(range(len(self.through))):
            torch.addcmul(grad_entering[chunk], grads[chunk + 1], self.through[chunk], out=grads[chunk])
        grad_written = grads[1:].flatten(2, 3).flatten(0, 1)
        grad_Bb = torch.bmm(self._by_group(self.x, self.dt * self.to_end), grad_written)
        grad_step = self._from_groups(torch.bmm(self.B, grad_written.mT)) * self.to_end.unsqueeze(-1)
        across = (grads[1:] * states[1:]).sum((-2, -1))
        from_state = torch.bmm(self.C, states[:-1].flatten(2, 3).flatten(0, 1).mT)
        read = self._from_groups(from_state.mul_(grad_read)).sum(-1)
        # Inside chunks.
        decay, products, mask = self._within()
        mixing = (decay * products.unsqueeze(2)).flatten(0, 2)
        grad_heads = self._by_head(grad_y)
        grad_step += self._from_heads(torch.bmm(mixing.mT, grad_heads))
        grad_mixing = torch.bmm(grad_heads, self._by_head(self.x, self.dt.unsqueeze(-1)).mT)
        read += self._from_heads(mixing.mul_(grad_mixing).sum(-1, keepdim=True)).squeeze(-1)
        grad_products = grad_mixing.view(decay.shape).mul_(decay).sum(2).mul_(mask).flatten(0, 1)
        self._write_groups(grad_B, grad_Bb.baddbmm_(grad_products.mT, self.C))
        self._write_groups(grad_C, grad_Cb.baddbmm_(grad_products, self.B))
        return grads[0], grad_step, read, across

    def _within(self) -> tuple[Tensor, Tensor, Tensor]:
        """Decays exp(a_i - a_j) [n, G, R, Q, Q], right for j <= i; C_i . B_j [n, G, Q, Q], 0 where masked; the mask.

        The mask [n, 1, Q, Q] is 1 for j <= i of the same sample. It is not applied to the decays, which are R times as
        many; they are finite above the diagonal.
        """
        log_decay = self.log_decay.permute(0, 2, 3, 1).contiguous()
        decay = log_decay.unsqueeze(-1) - log_decay.unsqueeze(-2)
        decay.clamp_(_MIN_LOG_DECAY, 0.0).exp_()
        same = (self.sample.unsqueeze(2) == self.sample.unsqueeze(1)).tril_()
        mask = same.to(decay.dtype).unsqueeze(1)
        products = torch.bmm(self.C, self.B.mT).unflatten(0, (len(self.sample), -1)).mul_(mask)
        return decay, products, mask

    def _by_group(self, values: Tensor, weight: Tensor) -> Tensor:
        """values [n, Q, G, R, P] times weight [n, Q, G, R] as [n * G, Q, R * P]."""
        n, size, groups, heads, width = values.shape
        out = values.new_empty(n, groups, size, heads, width)
        torch.mul(values, weight.unsqueeze(-1), out=out.transpose(1, 2))
        return out.view(n * groups, size, heads * width)

    def _from_groups(self, values: Tensor) -> Tensor:
        """[n * G, Q, R * P] -> [n, Q, G, R, P], a view."""
        n, _, groups, heads, _ = self.x.shape
        return values.view(n, groups, self.size, heads, -1).transpose(1, 2)

    def _by_head(self, values: Tensor, weight: Tensor | float = 1.0) -> Tensor:
        """[n, Q, G, R, P], times a weight, as [n * G * R, Q, P]."""
        n, size, groups, heads, width = values.shape
        out = values.new_empty(n, groups, heads, size, width)
        torch.mul(values, weight, out=out.permute(0, 3, 1, 2, 4))
        return out.flatten(0, 2)

    def _from_heads(self, values: Tensor) -> Tensor:
        """[n * G * R, Q, P] -> [n, Q, G, R, P], a view."""
        n, _, groups, heads, _ = self.x.shape
        return values.view(n, groups, heads, self.size, -1).permute(0, 3, 1, 2, 4)

    def _write_groups(self, out: Tensor, values: Tensor) -> None:
        """Writes [n * G, Q, N] where the block is in [L, G, N]."""
        self.cut(out).copy_(values.view(len(self.x), -1, *values.shape[1:]).transpose(1, 2))


def _exp(log_decay: Tensor) -> Tensor:
    """exp of something at most 0, without underflow."""
    return log_decay.clamp(min=_MIN_LOG_DECAY).exp_()
