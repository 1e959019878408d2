"""What training loops do: mixed precision, clipping, chunks of time, checkpointing, torch.func."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

from rmc_kernels import RelationalMemory
from rmc_kernels.training import checkpointed, truncated
from tests.habits import BATCH, EVERY_BACKEND, EVERY_VARIANT, STEPS, close, close_gradients, gradients, inputs, layer


def _options() -> dict[str, Tensor]:
    resets = torch.rand(BATCH, STEPS, generator=torch.Generator().manual_seed(5)) < 0.3
    return {"lengths": torch.tensor([6, 0, 3, 5]), "resets": resets}


HALF_TYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@pytest.mark.feature("training: autocast (bfloat16, float16)")
@EVERY_BACKEND
@EVERY_VARIANT
@HALF_TYPES
def test_autocast(dtype: torch.dtype, variant: str, backend: str) -> None:
    """Under autocast the layer is the half layer, with float32 memory and float32 gradients."""
    made, x = layer(variant, backend), inputs()
    half = copy.deepcopy(made).to(dtype)
    with torch.autocast("cpu", dtype):
        output, memory = made(x)
    expected, expected_memory = half(x.to(dtype))
    assert output.dtype == dtype
    assert memory.dtype == torch.float32
    assert torch.equal(output, expected)
    assert torch.equal(memory, expected_memory)
    output.float().square().sum().backward()
    expected.float().square().sum().backward()
    ours, theirs = gradients(made), gradients(half)
    for name, value in ours.items():
        assert value.dtype == torch.float32
        assert torch.equal(value.to(dtype), theirs[name]), name


@pytest.mark.feature("training: half types (bfloat16, float16), near float64")
@EVERY_BACKEND
@EVERY_VARIANT
@HALF_TYPES
@pytest.mark.parametrize("batch", [BATCH, 32])  # 12 rows of memory and 96: the cpu backend has kernels for each
def test_half_types(batch: int, dtype: torch.dtype, variant: str, backend: str) -> None:
    """Of the same rounded weights and inputs; chunks with the carried memory are the sequence, bit for bit."""
    made, x = layer(variant, backend).to(dtype), inputs(batch, STEPS, 8).to(dtype)
    exact = copy.deepcopy(made).double()
    exact.backend = "reference"
    output, memory = made(x)
    chunks = list(truncated(made, x, chunk_steps=4))
    assert torch.equal(torch.cat([chunk.output for chunk in chunks], 1), output)
    assert torch.equal(chunks[-1].memory, memory)
    expected = exact(x.double())[0]
    output.float().square().mean().backward()
    expected.square().mean().backward()
    rounding = torch.finfo(dtype).eps
    assert (output.double() - expected).abs().max() <= 8 * rounding
    ours, theirs = gradients(made), gradients(exact)
    for name, value in ours.items():
        assert value.dtype == dtype
        error = (value.double() - theirs[name]).norm() / theirs[name].norm()
        assert error <= 16 * rounding, (name, error / rounding)


@pytest.mark.feature("training: GradScaler, clipping, fused Adam")
@EVERY_BACKEND
@EVERY_VARIANT
def test_scaled_and_clipped_steps(variant: str, backend: str) -> None:
    """Three steps with a scaled loss and clipped gradients are those of plain float64 training."""

    def train(model: RelationalMemory, x: Tensor, scaler: Any, fused: bool) -> list[float]:
        optimizer, norms = torch.optim.Adam(model.parameters(), 1e-2, eps=1e-3, fused=fused), []
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(model(x)[0].square().mean()).backward()
            scaler.unscale_(optimizer)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.05).item())
            scaler.step(optimizer)
            scaler.update()
        return norms

    made = layer(variant, backend)
    exact = RelationalMemory.from_spec(made.spec, dtype=torch.float64)
    exact.load_state_dict(made.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    norms = train(made, inputs(), scaler, fused=True)
    expected = train(exact, inputs().double(), torch.amp.GradScaler("cpu", enabled=False), fused=False)
    assert norms == pytest.approx(expected, rel=1e-4)
    assert min(norms) > 0.05  # clipping did something
    for name, value in made.named_parameters():
        torch.testing.assert_close(value.double(), exact.get_parameter(name), rtol=1e-4, atol=1e-5)


@pytest.mark.feature("training: truncated backpropagation through time")
@EVERY_BACKEND
@EVERY_VARIANT
def test_truncated_backpropagation(variant: str, backend: str) -> None:
    """Outputs of one call; the gradient of each chunk alone, its memory being a constant."""
    made, x, options = layer(variant, backend), inputs(), _options()
    output, memory = made(x, **options)
    chunks = []
    for chunk in truncated(made, x, chunk_steps=4, **options):
        assert torch.equal(chunk.output, output[:, chunk.span])
        chunk.output.square().sum().backward()
        chunks.append(chunk)
    assert [chunk.span for chunk in chunks] == [slice(0, 4), slice(4, 6)]
    assert torch.equal(chunks[-1].memory, memory)
    ours = gradients(made)
    first = made(x[:, :4], lengths=options["lengths"].clamp(max=4), resets=options["resets"][:, :4])
    second = made(
        x[:, 4:], first[1].detach(), lengths=(options["lengths"] - 4).clamp(min=0), resets=options["resets"][:, 4:]
    )
    (first[0].square().sum() + second[0].square().sum()).backward()
    close_gradients(ours, gradients(made))


@pytest.mark.feature("training: checkpointing over chunks of time")
@EVERY_BACKEND
@EVERY_VARIANT
def test_checkpointing(variant: str, backend: str) -> None:
    made, options = layer(variant, backend, initial_memory="learned"), _options()
    results = []
    for run in (made, lambda *a, **k: checkpointed(made, *a, chunk_steps=4, **k)):
        x = inputs().requires_grad_()
        output, memory = run(x, **options)
        (output.square().sum() + memory.sum()).backward()
        assert x.grad is not None
        results.append((output, memory, x.grad, gradients(made)))
    plain, ours = results
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    close(ours[2], plain[2])
    close_gradients(ours[3], plain[3])


def test_checkpointing_keeps_less() -> None:
    made, x = layer("sonnet", "cpu"), inputs(2, 64, 8)

    def saved_elements(run: Any) -> int:
        sizes: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run()
        return sum(sizes.values())

    memories = 2 * 64 * 3 * 8
    assert saved_elements(lambda: made(x)) >= memories
    assert saved_elements(lambda: checkpointed(made, x, chunk_steps=8)) < memories


def test_chunks_of_both_batch_orders_and_their_errors() -> None:
    made, turned = layer("sonnet", "cpu"), layer("sonnet", "cpu", batch_first=False)
    x, options = inputs(), _options()
    output, memory = checkpointed(made, x, chunk_steps=4, **options)
    time_first = checkpointed(
        turned, x.transpose(0, 1), chunk_steps=4, lengths=options["lengths"], resets=options["resets"].t()
    )
    assert torch.equal(time_first[0].transpose(0, 1), output)
    assert torch.equal(time_first[1], memory)
    empty, same = checkpointed(made, x[:, :0], memory, chunk_steps=4)
    assert empty.shape == (BATCH, 0, 24)
    assert torch.equal(same, memory)
    for wrong, message in (
        (lambda: checkpointed(made, x, chunk_steps=0), "chunk_steps must be an int of at least 1, got 0"),
        (lambda: checkpointed(made, x[0], chunk_steps=2), r"x must be batched, \[B, T, 8\], got \[6, 8\]"),
        (lambda: checkpointed(nn.LSTM(8, 3), x, chunk_steps=2), "layer must be a RelationalMemory"),  # type: ignore[arg-type]
        (lambda: checkpointed(made, x, chunk_steps=2, lengths=[6.0] * 4), "lengths must be integers"),  # type: ignore[list-item]
        (
            lambda: checkpointed(made, x, chunk_steps=2, lengths=options["lengths"] - 1),
            "lengths must be from 0 to T = 6, got one below",
        ),
        (
            lambda: list(truncated(made, x, chunk_steps=2, resets=options["resets"][:, 1:])),
            r"resets must be \[B, T\] = \[4, 6\], got \[4, 5\]",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            wrong()


@pytest.mark.feature("torch.func: functional_call, vmap over models, per-sample gradients", backend="reference")
@EVERY_VARIANT
def test_functional_transforms(variant: str) -> None:
    models = [layer(variant, "reference"), layer(variant, "reference")]
    with torch.no_grad():
        for value in models[1].parameters():
            value.mul_(1.5)
    params, buffers = stack_module_state(models)
    x = inputs()

    def output(params: dict[str, Tensor], x: Tensor) -> Tensor:
        found: Tensor = functional_call(models[0], (params, buffers), (x,))[0]
        return found

    ensemble = vmap(output, in_dims=(0, None))(params, x)
    for ours, model in zip(ensemble, models, strict=True):
        close(ours, model(x)[0])

    def loss(params: dict[str, Tensor], sample: Tensor) -> Tensor:
        return output(params, sample[None]).square().sum()

    own = {name: value.detach() for name, value in models[0].named_parameters()}
    per_sample = vmap(grad(loss), in_dims=(None, 0))(own, x)
    for b in range(BATCH):
        models[0](x[b : b + 1])[0].square().sum().backward()
        close_gradients({name: value[b] for name, value in per_sample.items()}, gradients(models[0]))
