"""The TorchRL module: acting step by step equals learning over sequences, across episode boundaries."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.habits import BATCH, EVERY_BACKEND, EVERY_VARIANT, STEPS, close, inputs, layer

pytest.importorskip("torchrl", reason="needs torchrl")
tensordict = pytest.importorskip("tensordict", reason="needs tensordict")

IS_INIT = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()


def _module(variant: str, backend: str) -> Any:
    from rmc_kernels.compat.torchrl import RelationalMemoryModule

    core = layer(variant, backend, initial_memory="learned")
    return RelationalMemoryModule(core, in_key="seen", out_key="features")


@pytest.mark.feature("TorchRL module with is_init: steps and sequences")
@EVERY_BACKEND
@EVERY_VARIANT
def test_steps_equal_sequences(variant: str, backend: str) -> None:
    from torchrl.modules import set_recurrent_mode

    module, x, carried = _module(variant, backend), inputs(), inputs(BATCH, 3, 8, seed=2)
    memory, features = carried, []
    for t in range(STEPS):
        step = tensordict.TensorDict(
            {"seen": x[:, t], "memory": memory, "is_init": IS_INIT[:, t, None]}, batch_size=[BATCH]
        )
        module(step)
        memory = step["next", "memory"]
        features.append(step["features"])
    stored = torch.cat([carried[:, None], torch.full((BATCH, STEPS - 1, 3, 8), float("nan"))], 1)
    batch = tensordict.TensorDict(
        {"seen": x, "memory": stored, "is_init": IS_INIT[..., None]}, batch_size=[BATCH, STEPS]
    )
    with set_recurrent_mode(True):
        module(batch)
    assert torch.equal(batch["features"], torch.stack(features, 1))
    assert torch.equal(batch["next", "memory"][:, -1], memory)
    assert batch["next", "memory"][:, :-1].abs().sum() == 0
    expected, final = module.layer(x, carried, resets=IS_INIT)
    close(batch["features"], expected)
    close(memory, final)
    ours = torch.autograd.grad(batch["features"].square().sum(), module.layer.learned_memory)[0]
    theirs = torch.autograd.grad(torch.stack(features, 1).square().sum(), module.layer.learned_memory)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.feature("TorchRL module in an environment's rollout", variant="sonnet")
@EVERY_BACKEND
def test_rollouts(backend: str) -> None:
    """With InitTracker and the primer, what a rollout stored is what a sequence computes."""
    from tensordict.nn import TensorDictModule, TensorDictSequential
    from torchrl.data import Composite, Unbounded
    from torchrl.envs import EnvBase, InitTracker, TransformedEnv
    from torchrl.modules import set_recurrent_mode

    class Countdown(EnvBase):  # type: ignore[misc]
        """Shows a random vector; an episode lasts three steps."""

        def __init__(self) -> None:
            super().__init__(batch_size=[BATCH])
            self.observation_spec = Composite(seen=Unbounded((BATCH, 8)), shape=[BATCH])
            self.action_spec = Unbounded((BATCH, 1))
            self.reward_spec = Unbounded((BATCH, 1))
            self.left = torch.zeros(BATCH, 1, dtype=torch.long)

        def _reset(self, data: Any) -> Any:
            begins = torch.ones(BATCH, 1, dtype=torch.bool) if data is None else data.get("_reset", None)
            begins = torch.ones(BATCH, 1, dtype=torch.bool) if begins is None else begins
            self.left = torch.where(begins, 3, self.left)
            return tensordict.TensorDict({"seen": torch.randn(BATCH, 8)}, batch_size=[BATCH])

        def _step(self, data: Any) -> Any:
            self.left = self.left - 1
            state = {"seen": torch.randn(BATCH, 8), "reward": data["action"], "done": self.left == 0}
            return tensordict.TensorDict(state, batch_size=[BATCH])

        def _set_seed(self, seed: int | None) -> None:
            torch.manual_seed(seed or 0)

    module = _module("sonnet", backend)
    with torch.no_grad():
        module.layer.learned_memory.normal_()  # not the zeros that the primer puts there
    readout = TensorDictModule(nn.Linear(24, 1), in_keys=["features"], out_keys=["action"])
    env = TransformedEnv(Countdown(), InitTracker()).append_transform(module.make_tensordict_primer())
    with torch.no_grad():
        rollout = env.rollout(7, TensorDictSequential(module, readout), break_when_any_done=False)
    assert rollout["is_init"][..., 0].int().tolist() == [[1, 0, 0, 1, 0, 0, 1]] * BATCH
    with set_recurrent_mode(True):
        again = module(rollout.select("seen", "memory", "is_init"))
    assert torch.equal(again["features"], rollout["features"])
    assert torch.equal(again["next", "memory"][:, -1], rollout["next", "memory"][:, -1])
    torch.manual_seed(0)
    ordinary = env.rollout(7, TensorDictSequential(module, readout), break_when_any_done=False)
    torch.manual_seed(0)
    with module.frozen_weights():
        frozen = env.rollout(7, TensorDictSequential(module, readout), break_when_any_done=False)
    assert torch.equal(frozen["features"], ordinary["features"])
    assert torch.equal(frozen["next", "memory"], ordinary["next", "memory"])


@EVERY_BACKEND
@EVERY_VARIANT
def test_frozen_steps(variant: str, backend: str) -> None:
    """Single steps inside the block are steps of the object, without gradient; sequences and copies are not."""
    module, x = _module(variant, backend), inputs()
    assert module.layer(x)[0].requires_grad

    def step(module: Any, memory: Tensor | None) -> Any:
        given = {"seen": x[:, 0], "is_init": IS_INIT[:, 0, None]} | ({} if memory is None else {"memory": memory})
        found = module(tensordict.TensorDict(given, batch_size=[BATCH]))
        return found["features"], found["next", "memory"]

    def sequence(module: Any) -> Tensor:
        module.default_recurrent_mode = True
        found = module(tensordict.TensorDict({"seen": x, "is_init": IS_INIT[..., None]}, batch_size=[BATCH, STEPS]))
        module.default_recurrent_mode = False
        features: Tensor = found["features"]
        return features

    carried = inputs(BATCH, 3, 8, seed=2)
    with torch.no_grad():
        wants = [step(module, carried), step(module, None)]
    with module.frozen_weights():
        for found, want in zip((step(module, carried), step(module, None)), wants, strict=True):
            for ours, theirs in zip(found, want, strict=True):
                assert torch.equal(ours, theirs)
                assert not ours.requires_grad
        with module.frozen_weights():
            assert not step(module, carried)[0].requires_grad
        assert not step(module, carried)[0].requires_grad
        assert sequence(module).requires_grad
        for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert step(other, carried)[0].requires_grad
    assert step(module, carried)[0].requires_grad
    with pytest.raises(KeyError), module.frozen_weights():
        raise KeyError
    assert step(module, carried)[0].requires_grad
    with pytest.raises(RuntimeError, match="changed inside"), module.frozen_weights(), torch.no_grad():
        module.layer.learned_memory.add_(1)
    assert step(module, carried)[0].requires_grad


def test_shapes_modes_and_errors() -> None:
    from rmc_kernels.compat.torchrl import RelationalMemoryModule

    module, x = _module("sonnet", "cpu"), inputs()
    expected: Tensor = module.layer(x[:, :1], resets=torch.ones(BATCH, 1, dtype=torch.bool))[0][:, 0]
    single = tensordict.TensorDict({"seen": x[0, 0], "is_init": torch.ones(1, dtype=torch.bool)}, batch_size=[])
    close(module(single)["features"], expected[0])
    nested = tensordict.TensorDict(
        {"seen": x.view(2, 2, STEPS, 8), "is_init": IS_INIT.view(2, 2, STEPS, 1)}, [2, 2, STEPS]
    )
    module.default_recurrent_mode = True
    assert module(nested)["features"].shape == (2, 2, STEPS, 24)
    close(nested["features"].flatten(0, 1), module.layer(x, resets=IS_INIT)[0])
    with pytest.raises(ValueError, match="tensordict takes at least one batch axis"):
        module(single)
    with pytest.raises(ValueError, match="layer takes one with batch_first=True"):
        RelationalMemoryModule(layer("sonnet", "cpu", batch_first=False), in_key="a", out_key="b")
    with pytest.raises(TypeError, match="layer takes a RelationalMemory"):
        RelationalMemoryModule(nn.LSTM(2, 2), in_key="a", out_key="b")  # type: ignore[arg-type]
