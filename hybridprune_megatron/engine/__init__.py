"""Lightning strategy over megatron-core: process groups, training step, checkpoints, the CPU (gloo) adapter.

Nothing heavy is imported here, so that a configuration error shows before torch and megatron are loaded.
"""


def ensure_device_backend() -> str:
    """Makes megatron usable on this machine and names its backend. The one place where the CPU adapter is
    activated.

    Call it before megatron builds anything. Calling it again does nothing.

    Returns:
        "nccl" where CUDA is available, otherwise "gloo" (with the CPU adapter active).

    Raises:
        ValueError: this process was given GPUs that it cannot use.
    """
    import torch

    if torch.cuda.is_available():
        return "nccl"
    from hybridprune_megatron.engine.gpus import check_gpus, given_gpus

    check_gpus()
    if given := given_gpus():
        raise ValueError(f"{given}, but torch cannot use them: torch.cuda.init() says why")
    from hybridprune_megatron.engine import cpu_adapter

    cpu_adapter.activate()
    return "gloo"
