"""How training lays out rows: what a step keeps for its backward pass, and what the weight gradients are made of."""

from __future__ import annotations

from dataclasses import dataclass

from rmc_kernels.backends.triton.plan import Plan

#: Numbers kept of a row for each block: the mark of `project_qkv`, then mean and rstd of three norms.
MARKS = 7


@dataclass(frozen=True)
class TrainingPlan(Plan):
    """A plan with the rows of four buffers; offsets and widths are in elements.

    A row of the tile has one row in each buffer, in the steps that the buffer holds.

    * `kind`, in the compute dtype: of each block the queries, keys and values before their norm, the ReLU outputs of
      the MLP and, with an output projection, the concatenated heads.
    * `wide`, float32: of each block the attention and the MLP with their residuals, before their norms, and, where
      input rows are in the tile, what the block attends to; then the memory's gate terms.
    * `work`, in the compute dtype: of each block both sides of its weight gradients that `kind` does not have, then
      those of the gates.
    * `scratch`, float32: the gradients of a step on their way.

    Attributes:
        num_blocks: how many.
        projection: whether the heads pass through an output projection.
    """

    num_blocks: int
    projection: bool

    @property
    def hidden(self) -> int:
        """ReLU outputs of a block."""
        return self.layers - 1 + self.ends_in_relu

    # -- kind ---------------------------------------------------------------------------------------------------

    @property
    def hidden_at(self) -> int:
        """The first ReLU output; the queries, keys and values stand before it."""
        return self.F

    @property
    def heads_at(self) -> int:
        """The concatenated heads."""
        return self.F + self.hidden * self.D

    @property
    def block_kind(self) -> int:
        """Width of a block."""
        return self.heads_at + self.D * self.projection

    @property
    def kind_width(self) -> int:
        """Width of a row."""
        return self.num_blocks * self.block_kind

    # -- wide ---------------------------------------------------------------------------------------------------

    @property
    def candidate_at(self) -> int:
        """MLP and residual; attention and residual stand before them."""
        return self.D

    @property
    def entered_at(self) -> int:
        """What the block attends to."""
        return 2 * self.D

    @property
    def block_wide(self) -> int:
        """Width of a block."""
        return (2 + self.inputs_in_tile) * self.D

    @property
    def gates_at(self) -> int:
        """The memory's gate terms."""
        return self.num_blocks * self.block_wide

    @property
    def wide_width(self) -> int:
        """Width of a row."""
        return self.gates_at + self.G

    # -- work ---------------------------------------------------------------------------------------------------

    @property
    def mixed_at(self) -> int:
        """The MLP's input; the input of the queries, keys and values stands before it."""
        return self.D

    @property
    def d_qkv_at(self) -> int:
        """Gradient of the queries, keys and values before their norm."""
        return 2 * self.D

    @property
    def d_mlp_at(self) -> int:
        """Gradient of what each MLP layer puts out, before its ReLU."""
        return self.d_qkv_at + self.F

    @property
    def d_heads_at(self) -> int:
        """Gradient of what the output projection puts out."""
        return self.d_mlp_at + self.layers * self.D

    @property
    def block_work(self) -> int:
        """Width of a block."""
        return self.d_heads_at + self.D * self.projection

    @property
    def squashed_at(self) -> int:
        """Tanh of the memory."""
        return self.num_blocks * self.block_work

    @property
    def d_gates_at(self) -> int:
        """Gradient of the gates before their sigmoid."""
        return self.squashed_at + self.D

    @property
    def work_width(self) -> int:
        """Width of a row."""
        return self.squashed_at + (self.D + self.G if self.G else 0)

    # -- scratch ------------------------------------------------------------------------------------------------

    @property
    def inner_at(self) -> int:
        """Gradient on the residual way inside a block; that of a norm's output stands before it."""
        return self.D

    @property
    def held_at(self) -> int:
        """Gradient that reaches the incoming memory without passing a block."""
        return 2 * self.D

    @property
    def d_normal_at(self) -> int:
        """Gradient of the queries, keys and values after their norm."""
        return 3 * self.D

    @property
    def scratch_width(self) -> int:
        """Width of a row."""
        return self.d_normal_at + self.F

    # -- sums over the rows of a tile ---------------------------------------------------------------------------

    @property
    def attention_sums_at(self) -> int:
        """Gradients of the attention norm's weight and bias; those of the norm of q, k and v stand before them."""
        return 2 * self.F

    @property
    def mlp_sums_at(self) -> int:
        """Likewise of the MLP's norm."""
        return self.attention_sums_at + 2 * self.D

    @property
    def block_sums(self) -> int:
        """Width of a block."""
        return self.mlp_sums_at + 2 * self.D

    @property
    def sums_width(self) -> int:
        """Width of all blocks."""
        return self.num_blocks * self.block_sums
