"""Lightning strategy over megatron-core: process groups, training step, checkpoints, the CPU (gloo) adapter.

Nothing heavy is imported here, so that a configuration error shows before torch and megatron are loaded.
"""


def ensure_device_backend() -> str:
    """Makes megatron usable on this machine and names its backend. The one place where the CPU adapter is
    activated.

    Call it before megatron builds anything. Calling it again does nothing.

    Returns:
        "nccl" where CUDA is available, otherwise "gloo" (with the CPU adapter active).
    """
    import torch

    if torch.cuda.is_available():
        return "nccl"
    from hybridprune_megatron.engine import cpu_adapter

    cpu_adapter.activate()
    return "gloo"
