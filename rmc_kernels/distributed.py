"""What data-parallel training needs beyond PyTorch's own wrappers. DDP needs nothing; FSDP2 refuses 0-d parameters."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from rmc_kernels import errors


def replicate_scalars(module: nn.Module, group: dist.ProcessGroup | None = None) -> set[nn.Parameter]:
    """Keep the 0-d parameters of `module` (l0sg's gate biases) whole on every rank, their gradients averaged.

    `fully_shard` cannot shard a 0-d tensor and raises. Hand it the result:

        fully_shard(model, ignored_params=replicate_scalars(model))

    Each backward pass then averages these gradients over the ranks, as FSDP2 does with the others, so that clipping,
    optimizers and `torch.distributed.checkpoint` go on as if nothing were special.

    Args:
        module: the module, before it is sharded; every rank holds the same values.
        group: the ranks; None for all.

    Returns:
        The 0-d parameters.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be an nn.Module, got {errors.describe(module)}")

    def average(parameter: Tensor) -> None:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad, group=group)
        parameter.grad.div_(dist.get_world_size(group))

    scalars = {parameter for parameter in module.parameters() if not parameter.dim()}
    for parameter in scalars:
        parameter.register_post_accumulate_grad_hook(average)
    return scalars
