"""TextGAN-PyTorch (RelGAN and its relatives): its copy of L0SG's `RelationalMemory` as a drop-in."""

from __future__ import annotations

from torch import Tensor, nn

from rmc_kernels.compat import conversion, l0sg


class RelationalMemory(l0sg.RelationalMemory):
    """williamSYSU/TextGAN-PyTorch's `models.relational_rnn_general.RelationalMemory`, on the fused backends.

    As `compat.l0sg.RelationalMemory` (constructor, state_dict, traps), but for what TextGAN changed:
        * outputs keep a time axis: [B, T, N * D], or [B, 1, N * D] without `return_all_outputs`;
        * nothing is detached: gradients flow from call to call, through the memory, until the caller cuts them with
          `repackage_hidden`. (TextGAN's first versions still detached.)
    """

    def forward(self, inputs: Tensor, memory: Tensor, treat_input_as_matrix: bool = False) -> tuple[Tensor, Tensor]:
        """Run the sequence.

        Args:
            inputs: [B, T, I], T >= 1; what follows the time axis is flattened to I. Dtype of the parameters.
            memory: [B, N, D].
            treat_input_as_matrix: has no effect, as in the original.

        Returns:
            All outputs [B, T, N * D] with `return_all_outputs`, the last one [B, 1, N * D] otherwise.
            The memory [B, N, D], float32 for half types.

        Raises:
            TypeError, ValueError: naming the argument, what it must be and what it got; as in `compat.l0sg`.
        """
        outputs, final = self._run_sequence(inputs, memory)
        return outputs if self.return_all_outputs else outputs[:, -1:], final


def from_module(original: nn.Module, *, backend: str = "auto") -> RelationalMemory:
    """A drop-in from a living module of TextGAN's class, or of one derived from it; see `compat.l0sg.from_module`."""
    return conversion.convert(original, RelationalMemory, backend)
