"""The two ways in which the CPU backend gives C++ its tensors: as tensors, which C++ reads itself, and as addresses."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from rmc_kernels.backends import Call, cpu
from rmc_kernels.backends.cpu import CpuBackend
from tests.cpu_cases import SPECS, everything, make, same_bits

pytestmark = pytest.mark.skipif(cpu._TENSORS is None, reason="torch is older than 2.10")


@pytest.fixture
def addresses_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Makes the backend do as beside an older torch."""

    def switch() -> None:
        monkeypatch.setattr(cpu, "_TENSORS", None)
        cpu.planned_cell.cache_clear()

    yield switch
    cpu.planned_cell.cache_clear()


def read(name: str, call: Call) -> Tensor | None:
    """What the cell makes of a call that it is given as tensors."""
    cell = cpu.planned_cell(SPECS[name], "float32", "generic").given_tensors
    found: tuple[Tensor, Tensor] | None = cell.forward(call.flat(), 1, None, 0, 0)
    return None if found is None else found[0]


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize(("batch", "steps"), [(3, 4), (0, 4), (3, 0)])
@pytest.mark.parametrize("name", SPECS)
def test_both_ways_give_the_same_bits(
    name: str, batch: int, steps: int, save: bool, addresses_alone: Callable[[], None]
) -> None:
    call, grad = make(SPECS[name], batch, steps, "lr")
    assert read(name, call) is not None
    direct = everything(CpuBackend(), SPECS[name], call, grad, save)
    addresses_alone()
    by_address = everything(CpuBackend(), SPECS[name], call, grad, save)
    same_bits(direct, by_address)
    assert {key: value.shape for key, value in direct.items()} == {key: v.shape for key, v in by_address.items()}


@pytest.mark.parametrize("way", ["tensors", "addresses"])
@pytest.mark.parametrize("options", ["", "lr"])
@pytest.mark.parametrize("name", SPECS)
def test_the_final_memory_is_the_last_in_a_tensor_of_its_own(
    name: str, options: str, way: str, addresses_alone: Callable[[], None]
) -> None:
    if way == "addresses":
        addresses_alone()
    for batch, steps in ((3, 4), (3, 1), (0, 2)):
        call, _ = make(SPECS[name], batch, steps, options)
        for save in (False, True):
            memories, _, final = CpuBackend().forward(SPECS[name], call, save)
            assert type(final) is Tensor
            assert final.is_contiguous()
            assert torch.equal(final, memories[:, -1])
            assert batch == 0 or final.untyped_storage().data_ptr() != memories.untyped_storage().data_ptr()


class Marked(torch.nn.Parameter):
    """A class of tensors that is not known."""


def opposite(tensor: Tensor) -> Tensor:
    """The same values with a sign that is left to be flipped."""
    turned: Tensor = torch._neg_view(-tensor)
    assert turned.is_neg()
    return turned


def spread(tensor: Tensor) -> Tensor:
    """The same values, not contiguous."""
    return torch.stack([tensor, tensor], -1)[..., 0]


CONVERTED: dict[str, Callable[[Tensor], Tensor]] = {
    "strides": spread,
    "sign": opposite,
    "class": Marked,
}


@pytest.mark.parametrize("field", ["x", "memory", "reset_memory", "params"])
@pytest.mark.parametrize("change", CONVERTED)
def test_tensors_that_need_converting_are_left_to_the_caller(field: str, change: str) -> None:
    call, grad = make(SPECS["sonnet"], 3, 4, "lr")
    want = everything(CpuBackend("generic"), SPECS["sonnet"], call, grad)
    for place in range(len(call.params) if field == "params" else 1):
        params = list(call.params)
        if field == "params":
            params[place] = CONVERTED[change](params[place].clone())
        changed = {} if field == "params" else {field: CONVERTED[change](getattr(call, field).clone())}
        fields = {name: getattr(call, name) for name in ("x", "memory", "lengths", "resets", "reset_memory")}
        given = Call(**fields | {"params": tuple(params)} | changed)
        assert read("sonnet", given) is None
        same_bits(everything(CpuBackend("generic"), SPECS["sonnet"], given, grad), want)


def test_no_wrong_tensor_reaches_a_kernel() -> None:
    """Nothing of another dtype, shape or device, and no freed memory, whatever Python has checked."""
    call, _ = make(SPECS["sonnet"], 3, 4, "lr")
    flat = call.flat()
    cell = cpu.planned_cell(SPECS["sonnet"], "float32", "generic").given_tensors
    assert cell.forward(flat, 1, None, 0, 0) is not None
    for place, tensor in enumerate(flat):
        if tensor is None:
            continue
        freed = tensor.clone()
        freed.untyped_storage().resize_(0)
        wrong = (tensor.to(torch.float16), tensor[..., :-1].contiguous(), tensor[None], tensor.to("meta"), freed, 7)
        for value in wrong:
            assert cell.forward((*flat[:place], value, *flat[place + 1 :]), 1, None, 0, 0) is None, (place, value)
    assert cell.forward(flat[:-1], 1, None, 0, 0) is None
    assert cell.forward((*flat, flat[-1]), 1, None, 0, 0) is None
    without_reset_memory = (*flat[:5], None, *flat[6:])
    assert cell.forward(without_reset_memory, 1, None, 0, 0) is None


def test_gradients_and_memories_are_tensors_of_their_own() -> None:
    call, grad = make(SPECS["sonnet"], 3, 4, "lr")
    found = everything(CpuBackend(), SPECS["sonnet"], call, grad)
    storages = {value.untyped_storage().data_ptr() for value in found.values()}
    assert len(storages) == len(found)
    for value in found.values():
        assert type(value) is Tensor
        assert value.is_contiguous()
        assert value.storage_offset() == 0
        before = value.clone()
        assert torch.equal(value.add_(1), before + 1)


def test_gradients_that_are_not_needed_are_none() -> None:
    call, grad = make(SPECS["sonnet"], 3, 4)
    memories, activations, _ = CpuBackend().forward(SPECS["sonnet"], call, False)
    needs = [False] * (3 + len(call.params))
    for wanted in (None, 0, 1, 5):
        flags = [place == wanted for place in range(len(needs))]
        grads = CpuBackend().backward(SPECS["sonnet"], call, memories, activations, grad, flags)
        assert [each is not None for each in grads] == flags


@pytest.mark.parametrize("way", ["tensors", "addresses"])
def test_a_gradient_whose_sign_is_left_to_be_flipped(way: str, addresses_alone: Callable[[], None]) -> None:
    call, grad = make(SPECS["sonnet"], 3, 4)
    if way == "addresses":
        addresses_alone()
    want = everything(CpuBackend(), SPECS["sonnet"], call, grad)
    same_bits(everything(CpuBackend(), SPECS["sonnet"], call, opposite(grad)), want)
