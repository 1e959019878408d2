"""TorchRL: the layer as a tensordict module that honours `is_init`, like `LSTMModule`. Importing this needs torchrl."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torchrl.data import Unbounded
from torchrl.envs.transforms import TensorDictPrimer
from torchrl.modules import recurrent_mode

from rmc_kernels import errors
from rmc_kernels.frozen import FrozenCell
from rmc_kernels.layers import RelationalMemory


class RelationalMemoryModule(TensorDictModuleBase):  # type: ignore[misc] # untyped where torchrl is missing
    """A `RelationalMemory` in a TorchRL policy: features, memory and `is_init` in, output and next memory out.

    As with `LSTMModule`, a tensordict holds single steps unless `set_recurrent_mode(True)` (or
    `default_recurrent_mode`) says that its last batch axis is time. Unlike there:
        * `is_init` loads the layer's own initial memory (not zeros), with gradient where it is learned;
        * episodes may begin anywhere in a sequence: one call runs it, nothing is split and padded;
        * in a sequence the memory of the first step is used where no episode begins there.

    An actor packs the weights once for all steps of a rollout, which then have no gradient:

        with module.frozen_weights():
            env.rollout(100, policy)

    Args:
        layer: the layer; `batch_first=True`.
        in_key: the observation's features, [*batch, I].
        out_key: where the output goes, [*batch, output_size].
        memory_key: the memory, [*batch, N, D]; the next one goes to ("next", memory_key). In a sequence only its last
            step holds the memory, zeros stand before it, as in LSTMModule.
        default_recurrent_mode: the mode outside of `set_recurrent_mode`.

    Raises:
        TypeError, ValueError: naming the argument, what it must be and what it got.
    """

    def __init__(
        self,
        layer: RelationalMemory,
        *,
        in_key: str,
        out_key: str,
        memory_key: str = "memory",
        default_recurrent_mode: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(layer, RelationalMemory):
            raise TypeError(f"layer takes a RelationalMemory, got {errors.describe(layer)}")
        if not layer.batch_first:
            raise ValueError("layer takes one with batch_first=True: a tensordict's last batch axis is time")
        self.layer = layer
        self.default_recurrent_mode = errors.boolean("default_recurrent_mode", default_recurrent_mode)
        self.in_keys = [in_key, memory_key, "is_init"]
        self.out_keys = [out_key, ("next", memory_key)]
        self._frozen: FrozenCell | None = None

    @contextmanager
    def frozen_weights(self) -> Iterator[None]:
        """As `RelationalMemory.frozen_weights`, which see: single steps inside the block are those of its object."""
        outer = self._frozen
        with self.layer.frozen_weights() as self._frozen:
            try:
                yield
            finally:
                self._frozen = outer

    def __getstate__(self) -> dict[str, Any]:
        """A copy is outside of the block that this is in."""
        return {**vars(self), "_frozen": None}

    @dispatch  # type: ignore[untyped-decorator]
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Run one step, or in recurrent mode the sequence; a missing memory is the initial one.

        Raises:
            ValueError: in recurrent mode, a tensordict without batch axes.
        """
        mode = recurrent_mode()
        sequence = self.default_recurrent_mode if mode is None else mode
        shape = tensordict.batch_size
        if sequence and not shape:
            raise ValueError("tensordict takes at least one batch axis, time, in recurrent mode; got none")
        rows = tensordict.reshape(-1, shape[-1] if sequence else 1)
        in_key, memory_key, init_key = self.in_keys
        resets = rows[init_key].reshape(rows.batch_size)
        carried = rows.get(memory_key, None)
        first = None if carried is None else carried[:, 0]
        if self._frozen is not None and not sequence:
            output, memory = self._frozen.step(rows[in_key][:, 0], first, resets=resets[:, 0])
            output = output[:, None]
        else:
            output, memory = self.layer(rows[in_key], first, resets=resets)
        following = memory.new_zeros(*rows.batch_size, *memory.shape[1:])
        following = torch.cat([following[:, :-1], memory[:, None]], 1)
        tensordict.set(self.out_keys[0], output.reshape(*shape, *output.shape[2:]))
        tensordict.set(self.out_keys[1], following.reshape(*shape, *memory.shape[1:]))
        return tensordict

    def make_tensordict_primer(self) -> Any:
        """The environment transform that adds the memory to reset tensordicts; see `TensorDictPrimer`."""
        memory = self.layer.initial_memory(1)[0].detach()
        spec = Unbounded(shape=memory.shape, dtype=memory.dtype, device=memory.device)
        return TensorDictPrimer({self.in_keys[1]: spec}, expand_specs=True)
