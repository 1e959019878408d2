"""The layer and the cell: layouts, memories, lengths and resets, dtypes, and the habits of nn.LSTM."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rmc_kernels import CellSpec, RelationalMemory, RelationalMemoryCell, relational_memory
from rmc_kernels.module import MemoryModule
from tests.cases import SPECS

BATCH, STEPS = 4, 6


@pytest.fixture
def layer() -> RelationalMemory:
    torch.manual_seed(0)
    return RelationalMemory(5, 3, 4, 2)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(BATCH, STEPS, 5, generator=torch.Generator().manual_seed(1))


def _close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_output_is_the_flattened_memory(layer: RelationalMemory, x: Tensor) -> None:
    output, memory = layer(x)
    memories, final = relational_memory(x, layer.initial_memory(BATCH), dict(layer.named_parameters()), layer.spec)
    assert torch.equal(output, memories.flatten(2))
    assert torch.equal(memory, final)
    assert layer.output_size == output.shape[-1] == 24


def test_the_state_dict_names_are_those_of_the_spec() -> None:
    for spec in SPECS.values():
        made = RelationalMemory.from_spec(spec)
        assert {name: tuple(value.shape) for name, value in made.state_dict().items()} == spec.parameter_shapes
        assert sum(p.numel() for p in made.parameters()) == spec.parameter_count


def test_batch_second(layer: RelationalMemory, x: Tensor) -> None:
    other = RelationalMemory(5, 3, 4, 2, batch_first=False)
    other.load_state_dict(layer.state_dict())
    resets = torch.rand(BATCH, STEPS) < 0.3
    lengths = torch.tensor([6, 1, 0, 3])
    output, memory, attention = layer(x, lengths=lengths, resets=resets, return_attention=True)
    turned = other(x.transpose(0, 1), lengths=lengths, resets=resets.t(), return_attention=True)
    _close(turned[0].transpose(0, 1), output)
    _close(turned[1], memory)
    _close(turned[2].transpose(0, 1), attention)


def test_unbatched(layer: RelationalMemory, x: Tensor) -> None:
    resets = torch.tensor([False, True, False, False, True, False])
    output, memory = layer(x[1:2], lengths=torch.tensor([5]), resets=resets[None])
    for length in (torch.tensor(5), torch.tensor([5])):
        alone, alone_memory = layer(x[1], lengths=length, resets=resets)
        _close(alone, output[0])
        _close(alone_memory, memory)
    assert alone_memory.shape == (1, 3, 8)


def test_matrix_input() -> None:
    made = RelationalMemory(5, 3, 4, 2, input_rows=2)
    x = torch.randn(BATCH, STEPS, 2, 5)
    output, _ = made(x)
    assert output.shape == (BATCH, STEPS, 24)
    _close(made(x[0])[0], output[0])
    cell = RelationalMemoryCell(5, 3, 4, 2, input_rows=2)
    cell.load_state_dict(made.state_dict())
    _close(cell(x[:, 0])[0], output[:, 0])


def test_the_cell_steps_through_the_sequence(layer: RelationalMemory, x: Tensor) -> None:
    cell = RelationalMemoryCell(5, 3, 4, 2)
    cell.load_state_dict(layer.state_dict())
    output, final = layer(x)
    memory = None
    for t in range(STEPS):
        step_output, memory = cell(x[:, t], memory)
        assert torch.equal(step_output, output[:, t])
    assert memory is not None
    assert torch.equal(memory, final)
    alone, alone_memory = cell(x[0, 0])
    _close(alone, output[0, 0])
    assert alone_memory.shape == (1, 3, 8)


def test_carried_memory_equals_one_run(layer: RelationalMemory, x: Tensor) -> None:
    output, final = layer(x)
    first, memory = layer(x[:, :2])
    second, memory = layer(x[:, 2:], memory)
    assert torch.equal(torch.cat([first, second], 1), output)
    assert torch.equal(memory, final)


def test_lengths_zero_the_output_and_give_the_last_true_memory(layer: RelationalMemory, x: Tensor) -> None:
    lengths = torch.tensor([6, 0, 2, 5])
    output, memory = layer(x, lengths=lengths)
    for b, length in enumerate(lengths.tolist()):
        assert output[b, length:].abs().sum() == 0
        alone, final = layer(x[b : b + 1, :length])
        _close(output[b : b + 1, :length], alone)
        _close(memory[b : b + 1], final)


def test_resets_load_the_layers_own_memory_not_the_carried_one(x: Tensor) -> None:
    made = RelationalMemory(5, 3, 4, 2, initial_memory="learned")
    with torch.no_grad():
        assert made.learned_memory is not None
        made.learned_memory.normal_()
    carried = torch.randn(BATCH, 3, 8)
    resets = torch.zeros(BATCH, STEPS, dtype=torch.bool)
    resets[1, 2] = True
    output, _ = made(x, carried, resets=resets)
    _close(output[1:2, 2:], made(x[1:2, 2:])[0])
    _close(output[[0, 2, 3]], made(x, carried)[0][[0, 2, 3]])
    output[1, 3].sum().backward()
    assert made.learned_memory.grad is not None
    assert made.learned_memory.grad.abs().min() > 0


@pytest.mark.parametrize(("slots", "head"), [(2, 4), (5, 3), (3, 3)])
def test_initial_memories(slots: int, head: int) -> None:
    made = RelationalMemory(2, slots, head)
    expected = torch.zeros(slots, head)
    for i in range(min(slots, head)):
        expected[i, i] = 1
    assert torch.equal(made.initial_memory(2), expected.expand(2, -1, -1))
    assert made.initial_memory(0).shape == (0, slots, head)
    assert RelationalMemory(2, slots, head, initial_memory="zeros").initial_memory(1).abs().sum() == 0
    normal = RelationalMemory(2, slots, head, initial_memory="normal")
    assert not torch.equal(normal.initial_memory(1), normal.initial_memory(1))
    many = normal.initial_memory(4000)
    assert many.square().sum(-1).mean().item() == pytest.approx(1, rel=0.05)
    learned = RelationalMemory(2, slots, head, initial_memory="learned")
    assert torch.equal(learned.initial_memory(2), expected.expand(2, -1, -1))
    assert "learned_memory" in learned.state_dict()


def test_normal_memory_is_drawn_once_a_call(x: Tensor) -> None:
    """With a reset before every step, each step starts from the draw that the call started from."""
    made = RelationalMemory(5, 3, 4, 2, initial_memory="normal")
    same = x[:, :1].expand(-1, STEPS, -1)
    output, _ = made(same, resets=torch.ones(BATCH, STEPS, dtype=torch.bool))
    assert torch.equal(output, output[:, :1].expand_as(output))
    assert not torch.equal(made(same)[0][:, 0], made(same)[0][:, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_carry_the_memory_in_float32(dtype: torch.dtype, x: Tensor) -> None:
    made = RelationalMemory(5, 3, 4, 2, dtype=dtype)
    half = x.to(dtype)
    output, memory = made(half)
    assert output.dtype == dtype
    assert memory.dtype == made.initial_memory(1).dtype == torch.float32
    first, carried = made(half[:, :3])
    assert torch.equal(torch.cat([first, made(half[:, 3:], carried)[0]], 1), output)
    made(half, memory.to(dtype))  # a half memory is widened
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == dtype for p in made.parameters())


def test_autocast(layer: RelationalMemory, x: Tensor) -> None:
    half = copy.deepcopy(layer).to(torch.bfloat16)
    expected, expected_memory = half(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        output, memory = layer(x)
    assert output.dtype == torch.bfloat16
    assert memory.dtype == torch.float32
    assert torch.equal(output, expected)
    assert torch.equal(memory, expected_memory)
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences(layer: RelationalMemory, x: Tensor, enforce_sorted: bool) -> None:
    lengths = torch.tensor([6, 4, 4, 1]) if enforce_sorted else torch.tensor([4, 1, 6, 4])
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=enforce_sorted)
    carried = torch.randn(BATCH, 3, 8)
    output, memory = layer(packed, carried)
    expected, expected_memory = layer(x, carried, lengths=lengths)
    assert isinstance(output, PackedSequence)
    padded, found = pad_packed_sequence(output, batch_first=True)
    assert torch.equal(found, lengths)
    _close(padded, expected)
    _close(memory, expected_memory)
    lstm_output, _ = nn.LSTM(5, 2, batch_first=True)(packed)
    assert torch.equal(lstm_output.batch_sizes, output.batch_sizes)


def test_attention_is_what_the_step_used(layer: RelationalMemory, x: Tensor) -> None:
    lengths = torch.tensor([6, 0, 2, 5])
    output, memory, attention = layer(x, lengths=lengths, return_attention=True)
    assert attention.shape == (BATCH, STEPS, 1, 2, 3, 4)
    reference = RelationalMemory(5, 3, 4, 2, backend="reference")  # which runs it whatever the backend
    reference.load_state_dict(layer.state_dict())
    plain, plain_memory = reference(x, lengths=lengths)
    assert torch.equal(output, plain)
    assert torch.equal(memory, plain_memory)
    for b, length in enumerate(lengths.tolist()):
        _close(attention[b, :length].sum(-1), torch.ones(length, 1, 2, 3))
        assert attention[b, length:].abs().sum() == 0


def test_attention_dropout_in_training_only(x: Tensor) -> None:
    made = RelationalMemory.from_spec(CellSpec.r2gen(3, 5, dropout=0.5))
    assert not torch.equal(made(x)[0], made(x)[0])
    torch.manual_seed(7)
    first = made(x)[0]
    torch.manual_seed(7)
    assert torch.equal(made(x)[0], first)
    made.eval()
    assert torch.equal(made(x)[0], made(x)[0])


def test_pickle_deepcopy_and_state_dict(layer: RelationalMemory, x: Tensor) -> None:
    expected = layer(x)[0]
    for other in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        assert torch.equal(other(x)[0], expected)
        with torch.no_grad():
            other.get_parameter("mlp.0.weight").zero_()
        assert not torch.equal(other(x)[0], expected)
        assert torch.equal(layer(x)[0], expected)
    stream = io.BytesIO()
    torch.save(layer.state_dict(), stream)
    stream.seek(0)
    fresh = RelationalMemory(5, 3, 4, 2)
    fresh.load_state_dict(torch.load(stream))
    assert torch.equal(fresh(x)[0], expected)


def test_functional_call_and_parametrization(layer: RelationalMemory, x: Tensor) -> None:
    zeros = {name: torch.zeros_like(value) for name, value in layer.named_parameters()}
    replaced = torch.func.functional_call(layer, zeros, (x,))[0]
    assert not torch.equal(replaced, layer(x)[0])
    nn.utils.parametrizations.weight_norm(layer.get_submodule("mlp.0"))
    before = layer(x)[0]
    with torch.no_grad():
        layer.get_parameter("mlp.0.parametrizations.weight.original0").mul_(2)
    after = layer(x)[0]
    assert not torch.equal(after, before)
    after.sum().backward()
    assert layer.get_parameter("mlp.0.parametrizations.weight.original0").grad is not None


def test_sonnet_initialisation() -> None:
    made = RelationalMemory(100, 2, 64, 4)
    weight = made.get_parameter("input_projection.weight").detach()
    sigma = 100**-0.5
    assert weight.abs().max() <= 2 * sigma
    assert weight.std().item() == pytest.approx(0.88 * sigma, rel=0.02)  # a normal cut at two sigma
    assert made.get_parameter("mlp.0.bias").abs().max() == 0
    before = weight.clone()
    made.reset_parameters()
    assert not torch.equal(before, made.get_parameter("input_projection.weight"))
    port = RelationalMemory.from_spec(CellSpec.l0sg(2, 4, 5, forget_bias=0.5))
    assert port.get_parameter("forget_bias").item() == 0.5
    assert port.get_parameter("mlp.0.bias").abs().max() > 0


def test_meta_device_then_real() -> None:
    made = RelationalMemory(5, 3, 4, 2, device="meta")
    assert all(p.is_meta for p in made.parameters())
    real = made.to_empty(device="cpu")
    real.reset_parameters()
    assert real(torch.randn(2, 3, 5))[0].isfinite().all()


def test_repr_names_the_sizes(layer: RelationalMemory) -> None:
    assert "'sonnet', input_size=5, mem_slots=3, head_size=4, num_heads=2" in repr(layer)


@pytest.mark.parametrize("cls", [RelationalMemory, RelationalMemoryCell])
def test_from_spec_gives_every_variant(cls: type[MemoryModule]) -> None:
    for spec in SPECS.values():
        made = cls.from_spec(spec)
        assert made.spec is spec
        shape = spec.input_shape if cls is RelationalMemoryCell else (2, *spec.input_shape)
        assert made(torch.randn(3, *shape))[1].shape == (3, spec.mem_slots, spec.mem_size)
