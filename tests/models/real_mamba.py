"""The Mamba kernels that a GPU runs, executed on a CPU; run as a program by ``test_real_mamba``.

python -m tests.models.real_mamba FOLDER [CHECK ...]

Transformer Engine and causal-conv1d are stand-ins here too (``tests.gpu_packages``): their kernels are compiled.
"""

from __future__ import annotations

import os
from collections.abc import Callable

if __name__ == "__main__":
    # Before anything imports Triton: its own library is compiled or interpreted as of then. And one configuration per
    # kernel, with no timing runs to choose it.
    os.environ |= {"TRITON_INTERPRET": "1", "MAMBA_DETERMINISTIC": "1"}

from tests.gpu_packages import install
from tests.gpu_packages.real import install_mamba, mamba_folder, pretend_a_device

if __name__ == "__main__":
    install()
    folder = mamba_folder()
    assert folder is not None, "make setup fetches mamba-ssm's source package"
    install_mamba(folder)

import torch
from torch import Tensor

from tests.models import te_path
from tests.programs import run_checks

#: Heads, groups, head width, state size; then lengths of packed samples and tokens of a chunk. The interpreter takes
#: seconds per chunk and head.
SIZES = (
    ((4, 2, 8, 16), (7, 1, 12), 16),
    ((1, 1, 16, 32), (33, 2), 32),
)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.clone().requires_grad_() for tensor in tensors]


def _close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-4, atol=2e-5 * float(other.abs().max()))


def the_scan_is_ours() -> None:
    """Output and gradients of every input, packed, on odd lengths."""
    pretend_a_device()
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    from hybridprune_megatron.ops.ssd import ssd_scan

    generator = torch.Generator().manual_seed(1)
    for (heads, groups, width, state), lengths, chunk in SIZES:
        total = sum(lengths)
        seq_idx = torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
        shapes = ((total, heads, width), (total, heads), (total, groups, state), (total, groups, state), (heads,))
        x, raw, B, C, D = (torch.randn(shape, generator=generator) for shape in shapes)
        A = -torch.rand(heads, generator=generator) - 0.1
        inputs = (x, torch.nn.functional.softplus(raw - 2), A, B, C, D)
        ours, theirs = _leaves(*inputs), _leaves(*inputs)
        y = ssd_scan(*ours, seq_idx, chunk)
        batched = [tensor if tensor.dim() == 1 else tensor.unsqueeze(0) for tensor in theirs]
        other = mamba_chunk_scan_combined(
            *batched[:5], chunk, D=batched[5], seq_idx=seq_idx.unsqueeze(0), dt_softplus=False
        ).squeeze(0)
        _close([other.detach()], [y.detach()])
        weight = torch.randn(y.shape, generator=generator)
        (y * weight).sum().backward()
        (other * weight).sum().backward()
        _close([leaf.grad for leaf in theirs], [leaf.grad for leaf in ours])


def the_gated_norm_is_ours() -> None:
    """Also of z as a view of a wider tensor, as the mixer gives it."""
    pretend_a_device()
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    from hybridprune_megatron.ops.norm import GATED_NORM_EPSILON, gated_rms_norm

    generator = torch.Generator().manual_seed(2)
    for width, group in ((16, 8), (32, 32)):
        y, wide = torch.randn(5, width, generator=generator), torch.randn(5, 2 * width + 8, generator=generator)
        weight = torch.rand(width, generator=generator)
        ours, theirs = _leaves(y, wide, weight), _leaves(y, wide, weight)
        found = gated_rms_norm(ours[0], ours[1][:, :width], ours[2], group)
        settings = {"eps": GATED_NORM_EPSILON, "group_size": group, "norm_before_gate": False}
        other = rmsnorm_fn(theirs[0], theirs[2], None, z=theirs[1][:, :width], **settings)
        _close([other.detach()], [found.detach()])
        found.square().sum().backward()
        other.square().sum().backward()
        _close([leaf.grad for leaf in theirs], [leaf.grad for leaf in ours])


def the_layers_over_it_are_those_of_torch() -> None:
    """Losses and gradients of the whole model, packed, reduced and recomputed."""
    pretend_a_device()
    import mamba_ssm.ops.triton.ssd_combined as real

    from hybridprune_megatron.models import mamba_ops

    assert real.__file__.startswith(str(mamba_folder()))
    assert mamba_ops.KernelMambaOps()._scan is real.mamba_chunk_scan_combined
    # In long chunks the interpreter has less to do.
    chunk = "model.mamba_chunk_size=64"
    te_path.same_as_torch([([chunk, "trainer.recompute=selective"], 0.5, (3, 2))], tolerance=5e-5)


CHECKS: tuple[Callable[[], None], ...] = (
    the_scan_is_ours,
    the_gated_norm_is_ours,
    the_layers_over_it_are_those_of_torch,
)


if __name__ == "__main__":
    run_checks(CHECKS)
