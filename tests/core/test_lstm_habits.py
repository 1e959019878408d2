"""What code written for nn.LSTM does to its layer, on every backend and variant."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import re
import warnings
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from rmc_kernels import CellSpec, RelationalMemory, RelationalMemoryCell, relational_memory
from rmc_kernels.training import checkpointed, truncated
from tests.habits import (
    BATCH,
    EVERY_BACKEND,
    EVERY_VARIANT,
    SPECS,
    STEPS,
    close,
    close_gradients,
    gradients,
    inputs,
    layer,
)


@pytest.mark.feature("nn.LSTM: PackedSequence in and out, unsorted too")
@EVERY_BACKEND
@EVERY_VARIANT
@pytest.mark.parametrize("lengths", [[6, 4, 4, 1], [4, 1, 6, 4]], ids=["sorted", "unsorted"])
def test_packed_sequences(variant: str, backend: str, lengths: list[int]) -> None:
    """Element by element in the caller's order: output, memory in and memory out."""
    made, x, carried = layer(variant, backend), inputs(), inputs(BATCH, 3, 8, seed=2)
    ordered = lengths == sorted(lengths, reverse=True)
    packed = pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=ordered)
    output, memory = made(packed, carried)
    assert isinstance(output, PackedSequence)
    padded, found = pad_packed_sequence(output, batch_first=True)
    assert found.tolist() == lengths
    for b, length in enumerate(lengths):
        alone, final = made(x[b : b + 1, :length], carried[b : b + 1])
        close(padded[b : b + 1, :length], alone)
        close(memory[b : b + 1], final)
    theirs = nn.LSTM(8, 5, batch_first=True)(packed)[0]
    assert torch.equal(output.batch_sizes, theirs.batch_sizes)
    for ours, lstm in zip(output[2:], theirs[2:], strict=True):
        assert (ours is None) == (lstm is None)
        assert ours is None or lstm is None or torch.equal(ours, lstm)


@pytest.mark.feature("nn.LSTM: unbatched input, both batch orders")
@EVERY_BACKEND
@EVERY_VARIANT
def test_layouts(variant: str, backend: str) -> None:
    made, x = layer(variant, backend), inputs()
    output, memory = made(x)
    turned = layer(variant, backend, batch_first=False)
    time_first, same = turned(x.transpose(0, 1))
    assert torch.equal(time_first.transpose(0, 1), output)
    assert torch.equal(same, memory)
    for single, first in ((made, 0), (turned, 0)):
        alone, final = single(x[1], inputs(1, 3, 8))
        expected, expected_final = made(x[1:2], inputs(1, 3, 8))
        close(alone, expected[first])
        close(final, expected_final)


@pytest.mark.feature("nn.LSTM: pickle, deepcopy, torch.save")
@EVERY_BACKEND
@EVERY_VARIANT
def test_copies_are_equal_and_independent(variant: str, backend: str) -> None:
    made, x = layer(variant, backend), inputs()
    stream = io.BytesIO()
    torch.save(made, stream)
    stream.seek(0)
    expected = made(x)[0]
    copies = (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), torch.load(stream, weights_only=False))
    for other in copies:
        assert torch.equal(other(x)[0], expected)
        with torch.no_grad():
            other.get_parameter("mlp.0.weight").zero_()
        assert not torch.equal(other(x)[0], expected)
        assert torch.equal(made(x)[0], expected)


@pytest.mark.feature("nn.LSTM: load_state_dict across dtypes and devices")
@EVERY_BACKEND
@EVERY_VARIANT
def test_state_dicts_move_between_dtypes_and_devices(variant: str, backend: str) -> None:
    made, x = layer(variant, backend), inputs()
    expected = made(x)[0]
    wide = RelationalMemory.from_spec(SPECS[variant], dtype=torch.float64)
    wide.load_state_dict(made.state_dict())
    back = RelationalMemory.from_spec(SPECS[variant], backend=backend)
    back.load_state_dict(wide.state_dict())
    assert torch.equal(back(x)[0], expected)
    assert all(value.dtype == torch.float32 for value in back.parameters())
    empty = RelationalMemory.from_spec(SPECS[variant], backend=backend, device="meta")
    empty.load_state_dict(made.state_dict(), assign=True)
    assert torch.equal(empty(x)[0], expected)
    cell = RelationalMemoryCell.from_spec(SPECS[variant], backend=backend)
    cell.load_state_dict(made.state_dict())
    close(cell(x[:, 0])[0], expected[:, 0])


@pytest.mark.feature("nn.LSTM: meta-device construction, reset_parameters")
@EVERY_BACKEND
@EVERY_VARIANT
def test_meta_construction_then_reset_draws_what_construction_draws(variant: str, backend: str) -> None:
    torch.manual_seed(3)
    expected = RelationalMemory.from_spec(SPECS[variant], backend=backend)
    with torch.device("meta"):
        made = RelationalMemory.from_spec(SPECS[variant], backend=backend)
    assert all(value.is_meta for value in made.parameters())
    made.to_empty(device="cpu")
    torch.manual_seed(3)
    made.reset_parameters()
    for name, value in expected.named_parameters():
        assert torch.equal(made.get_parameter(name), value), name
    assert torch.equal(made(inputs())[0], expected(inputs())[0])


@pytest.mark.feature("nn.LSTM: parametrizations")
@EVERY_BACKEND
@EVERY_VARIANT
def test_parametrizations_count_forward_and_backward(variant: str, backend: str) -> None:
    """weight_norm with g = 2 ||v|| is the layer with twice the weight, in value and in gradient."""
    made, x = layer(variant, backend), inputs()
    doubled = copy.deepcopy(made)
    nn.utils.parametrizations.weight_norm(made.get_submodule("mlp.0"))
    with torch.no_grad():
        made.get_parameter("mlp.0.parametrizations.weight.original0").mul_(2)
        doubled.get_parameter("mlp.0.weight").mul_(2)
    output, expected = made(x)[0], doubled(x)[0]
    close(output, expected)
    output.square().sum().backward()
    expected.square().sum().backward()
    ours, theirs = gradients(made), gradients(doubled)
    direction = ours.pop("mlp.0.parametrizations.weight.original1")
    magnitude = ours.pop("mlp.0.parametrizations.weight.original0")
    weight, gradient = doubled.get_parameter("mlp.0.weight").detach(), theirs.pop("mlp.0.weight")
    unit = weight / weight.norm(dim=1, keepdim=True)
    along = (gradient * unit).sum(1, keepdim=True)
    torch.testing.assert_close(magnitude, along, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(direction, 2 * (gradient - along * unit), rtol=1e-4, atol=1e-5)
    close_gradients(ours, theirs)


def _prune(module: nn.Module) -> None:
    prune.l1_unstructured(module, "weight", 0.5)


@pytest.mark.feature("nn.LSTM: pruning and the older spectral_norm")
@EVERY_BACKEND
@EVERY_VARIANT
@pytest.mark.parametrize("change", [_prune, nn.utils.spectral_norm])
def test_weights_that_a_hook_recomputes(variant: str, backend: str, change: Any) -> None:
    """Their hooks wait for the forward of a module that is never called; each call must see the weight anew."""
    made, plain, x = layer(variant, backend).eval(), layer(variant, backend).eval(), inputs()
    changed = made.get_submodule("mlp.0")
    change(changed)
    for _ in range(2):  # the second call after an update, as in training
        with torch.no_grad():
            changed.get_parameter("weight_orig").mul_(1.5).add_(0.1)
            mask = getattr(changed, "weight_mask", 1)
            weight = changed.get_parameter("weight_orig") * mask
            if not hasattr(changed, "weight_mask"):  # in evaluation u and v stay
                weight = weight / torch.dot(changed.get_buffer("weight_u"), weight @ changed.get_buffer("weight_v"))
            plain.get_parameter("mlp.0.weight").copy_(weight)
        output, expected = made(x)[0], plain(x)[0]
        close(output, expected)
        output.square().sum().backward()
        expected.square().sum().backward()
        ours, theirs = gradients(made), gradients(plain)
        original, weight_gradient = ours.pop("mlp.0.weight_orig"), theirs.pop("mlp.0.weight")
        close_gradients(ours, theirs)
        if hasattr(changed, "weight_mask"):
            torch.testing.assert_close(original, weight_gradient * mask, rtol=1e-4, atol=1e-5)
        assert original.abs().sum() > 0


def test_replaced_and_tied_modules_count() -> None:
    made, other, x = layer("sonnet", "auto"), layer("sonnet", "auto"), inputs()
    made.mlp = other.mlp
    with torch.no_grad():
        other.get_parameter("mlp.0.weight").zero_()
    assert torch.equal(made(x)[0], other(x)[0])
    made(x)[0].sum().backward()
    assert other.get_parameter("mlp.1.bias").grad is not None


@pytest.mark.feature("nn.LSTM: lengths as pack_padded_sequence takes them: tensors, lists, tuples, arrays")
@EVERY_BACKEND
@EVERY_VARIANT
def test_lengths_as_pack_padded_sequence_takes_them(variant: str, backend: str) -> None:
    made, x = layer(variant, backend), inputs()
    for values in ([6, 4, 4, 1], [0, 6, 2, 5]):
        expected, final = made(x, lengths=torch.tensor(values))
        assert expected[3, values[3] :].abs().max() == 0
        kinds: list[Any] = [
            values,
            tuple(values),
            np.array(values),
            np.array(values, dtype=np.uint16),
            torch.tensor(values, dtype=torch.int32),
            torch.tensor(values, dtype=torch.uint8),
            [torch.tensor(value) for value in values],
            [np.int64(value) for value in values],
        ]
        if 0 not in values:
            for lengths in kinds:
                packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
                close(pad_packed_sequence(made(packed)[0], batch_first=True)[0], expected)
        for lengths in kinds:
            for output, memory, *_ in (made(x, lengths=lengths), made(x, lengths=lengths, return_attention=True)):
                close(output, expected)
                close(memory, final)
            memories, last = relational_memory(
                x,
                made.initial_memory(BATCH),
                dict(made.named_parameters()),
                made.spec,
                lengths=lengths,
                backend=backend,
            )
            close(last, final)
            close(memories[0, -1], final[0])
            chunks = list(truncated(made, x, chunk_steps=4, lengths=lengths))
            close(torch.cat([chunk.output for chunk in chunks], 1), expected)
            close(checkpointed(made, x, chunk_steps=4, lengths=lengths)[1], final)
    alone = made(x[1:2], lengths=[4])[0][0]
    for length in (4, [4], (4,), np.int64(4), np.array([4]), torch.tensor(4)):
        close(made(x[1], lengths=length)[0], alone)
    assert made(x[:0], lengths=[])[0].shape == (0, STEPS, 24)


@pytest.mark.parametrize("cls", [RelationalMemory, RelationalMemoryCell])
def test_the_arguments_of_an_lstm_say_what_to_do_instead(cls: Any) -> None:
    """Though Python, asked first, would only say that two others are missing."""
    for make, message in (
        (lambda: cls(input_size=64, hidden_size=256, num_layers=2), r"hidden_size.*mem_slots.*num_layers.*stack sev"),
        (lambda: cls(hidden_size=256), "hidden_size.*mem_slots slots of num_heads"),
        (lambda: cls(64, 256, bidirectional=True), "bidirectional.*reversed in time"),
        (lambda: cls(64, 256), f"^{cls.__name__} requires head_size: .*write {cls.__name__}.input_size, mem_slots=4"),
        (lambda: cls(input_size=64), "requires mem_slots, head_size: .* in place of the hidden_size of nn.LSTM"),
        (cls, "requires input_size, mem_slots, head_size"),
    ):
        with pytest.raises(TypeError, match=message):
            make()
    with pytest.warns(UserWarning, match="not the hidden_size and num_layers of nn.LSTM") as warned:
        cls(10, 20, 2)
    assert [each.filename for each in warned] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cls(10, 4, 2)
        cls(10, 20, 16)
        cls.from_spec(CellSpec.sonnet(10, 20, 2))
    parameters = inspect.signature(cls).parameters
    assert [str(parameters[name].default) for name in ("input_size", "mem_slots", "head_size")] == ["<required>"] * 3


STATE = "pass memory, one tensor"
PADDING = r"lengths, \[B\]: the steps of each element"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hx", STATE), ("h0", STATE), ("state", STATE), ("mask", PADDING), ("src_key_padding_mask", PADDING),
        ("seq_lens", PADDING), ("dones", r"resets, bool \[B, T\]"), ("input", "pass the input by position"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("frozen", [False, True])
def test_calls_with_the_arguments_of_others_say_what_to_do_instead(name: str, message: str, frozen: bool) -> None:
    made, x, memory = layer("sonnet", "auto"), inputs(), inputs(BATCH, 3, 8)
    cell = RelationalMemoryCell.from_spec(SPECS["sonnet"])
    with torch.no_grad(), made.frozen_weights() if frozen else nullcontext(), cell.frozen_weights():
        for _ in range(2):
            made(x, memory), cell(x[:, 0], memory)
        for call, start in ((made, x), (cell, x[:, 0])):
            for arguments in ((start,), (start, memory), ()):
                with pytest.raises(TypeError, match=f"{type(call).__name__} has no argument '{name}'; .*{message}"):
                    call(*arguments, **{name: memory})
        ours = {
            "mask": "; rmc_kernels.RelationalMemory takes lengths",
            "dones": r"; pass resets, .* or \[B\] of a cell",
        }
        if name in ours:
            with pytest.raises(TypeError, match=ours[name]):
                cell(x[:, 0], **{name: memory})
        with pytest.raises(TypeError, match=r"x.* 4 were given|too many .*; pass lengths, resets, return_attention by"):
            made(x, memory, torch.ones(BATCH))
        with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
            made(x, other=memory)


def test_arguments_that_a_subclass_or_a_hook_takes_reach_it() -> None:
    class Masked(RelationalMemory):
        def forward(  # type: ignore[override]
            self, x: Tensor, hx: Tensor | None, mask: Tensor, scale: float = 1.0
        ) -> Any:
            return super().forward(x * scale, hx, lengths=mask.sum(1))

    x, mask = inputs(), torch.ones(BATCH, STEPS, dtype=torch.bool)
    made = Masked(8, 3, 4)
    assert torch.equal(made(x, hx=None, mask=mask)[0], made(x, None, mask)[0])
    assert torch.equal(made(x, None, mask, 2.0)[0], made(2 * x, None, mask=mask)[0])
    with pytest.raises(TypeError, match="unexpected keyword argument 'lengths'"):
        made(x, None, mask, lengths=[1])
    other = layer("sonnet", "auto")

    def renamed(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {"memory": kwargs["hx"]}

    other.register_forward_pre_hook(renamed, with_kwargs=True)
    memory = inputs(BATCH, 3, 8)
    assert torch.equal(other(x, hx=memory)[0], layer("sonnet", "auto")(x, memory)[0])


@pytest.mark.parametrize("frozen", [False, True])
def test_an_lstms_state_is_no_memory(frozen: bool) -> None:
    made, x, memory = layer("sonnet", "auto"), inputs(), inputs(BATCH, 3, 8)
    cell = RelationalMemoryCell.from_spec(SPECS["sonnet"])
    with torch.no_grad(), made.frozen_weights() if frozen else nullcontext(), cell.frozen_weights():
        for _ in range(2):
            made(x, memory), cell(x[:, 0], memory)
        for call, start in ((made, x), (cell, x[:, 0]), (made, x[0])):
            for state in ((memory, memory), [memory, memory], (memory,)):
                with pytest.raises(TypeError) as raised:
                    call(start, state)
                assert re.search(r"^memory must be one tensor \[B, N, D\] = \[[14], 3, 8\], got a", str(raised.value))
                assert "no cell state: pass the memory that the last call returned" in str(raised.value)
        with pytest.raises(TypeError, match=r"got torch\.int64; lengths and resets are passed by name"):
            made(x, torch.tensor([6, 4, 4, 1]))


@pytest.mark.parametrize("head", ["concat", "mean"])
def test_sizes_are_attributes(head: str) -> None:
    for cls in (RelationalMemory, RelationalMemoryCell):
        made = cls(8, 3, 4, 2, read_head=head)
        assert (made.input_size, made.hidden_size) == (8, 3 * 8)
        assert made.hidden_size == made.initial_memory(1).numel()
        assert made.output_size == (24 if head == "concat" else 8)
        nn.Linear(made.output_size, made.input_size)(made(inputs(4, 8))[0])
        with pytest.raises(AttributeError):
            made.hidden_size = 5  # type: ignore[misc]


def test_changing_the_output_in_place_is_never_silent() -> None:
    """The output is what the backward pass of a kernel starts from."""
    output = layer("sonnet", "cpu")(inputs())[0]
    output.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_flatten_parameters_and_repr() -> None:
    made = RelationalMemory(8, 3, 4, 2, batch_first=False, recompute="none", backend="reference")
    before = made(inputs())[0]
    assert made.flatten_parameters() is None  # type: ignore[func-returns-value]
    assert torch.equal(made(inputs())[0], before)
    first_line = repr(made).split("\n")[0] + repr(made)
    for part in ("input_size=8", "mem_slots=3", "batch_first=False", "recompute='none'", "backend='reference'"):
        assert part in first_line
    assert "batch_first" not in repr(RelationalMemory(8, 3, 4, 2))
