"""What every launch keeps to, shown without a GPU: the tensors' device, no waiting for the device, torch's settings."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

if os.environ.get("TRITON_INTERPRET") == "1" or find_spec("triton") is None or torch.cuda.is_available():
    pytest.skip("for a process without a GPU that does not interpret", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from rmc_kernels import CellSpec, backends, explain, relational_memory
from rmc_kernels.backends import Call
from rmc_kernels.backends.triton import activations, gradients, launch, trust
from tests.cases import SPECS, DrawnCall, draw
from tools.offline import offline

TRITON = backends.BACKENDS["triton"]
#: One cell for each way through the launch code.
CELLS = ("sonnet", "matrix-blocks", "textbook", "r2gen")
#: Operators that read a value of a tensor, or make (or may make) one whose size depends on values: all wait for the
#: device.
WAITING = (
    "_local_scalar_dense", "item", "equal", "is_nonzero", "nonzero", "masked_select", "index", "index_put_", "unique",
    "_unique2", "repeat_interleave", "allclose",
)  # fmt: skip
OnLaunch = Callable[[str, tuple[int, ...]], None]


class _Kernel:
    """In place of a kernel: neither compiled nor run, each launch is told to `on_launch(name, grid)`."""

    def __init__(self, name: str, on_launch: OnLaunch) -> None:
        self._name, self._on_launch = name, on_launch

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **kwargs: self._on_launch(self._name, grid)


@contextmanager
def _launches(monkeypatch: pytest.MonkeyPatch, on_launch: OnLaunch) -> Iterator[None]:
    with offline("sm_90"), monkeypatch.context() as patched:
        for owner, name in (
            (launch, "forward"), (launch, "project"), (activations, "forward_kept"), (gradients, "recompute"),
            (gradients, "backward"),
        ):  # fmt: skip
            patched.setattr(owner, name, _Kernel(name, on_launch))
        yield


# -- CUDA graphs -------------------------------------------------------------------------------------------------------


class _Recorder(TorchDispatchMode):
    """Every operator that runs, with the shapes and dtypes of what it makes; refuses one that would wait."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[tuple[str, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{name} waits for the device"
        made = func(*args, **(kwargs or {}))
        kinds = tuple((tuple(t.shape), t.dtype) for t in tree_leaves(made) if isinstance(t, Tensor))
        self.operators.append((name, kinds))
        return made


def _set_values(case: DrawnCall, last: bool) -> None:
    """The two extremes: whole lengths, no reset and nothing dropped; or the opposite, with an x that is not finite."""
    case.x.fill_(float("nan") if last else 1.0)
    case.options["lengths"].fill_(0 if last else case.x.shape[1])
    case.options["resets"].fill_(last)
    if "dropout_mask" in case.options:
        case.options["dropout_mask"].fill_(0 if last else 1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CELLS)
def test_a_call_can_be_captured(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """No operator waits for the device, and what is allocated and launched is the same for other values."""
    case = draw(SPECS[name], ("lengths", "resets"), batch=3, steps=4, dtype=dtype)
    found = []
    for last in (False, True):
        _set_values(case, last)
        launched: list[tuple[str, tuple[int, ...]]] = []
        with _launches(monkeypatch, lambda *launch: launched.append(launch)):  # noqa: B023
            with _Recorder() as around:  # it sees the backend as one operator
                relational_memory(**case.arguments(), backend="triton")
            with _Recorder() as inside:
                TRITON.forward(case.spec, case.call(), False)
        found.append((around.operators, inside.operators, launched))
    assert found[0] == found[1]
    assert "unroll_forward" in dict(around.operators)
    assert "new_empty" in dict(inside.operators)
    assert [name for name, _ in launched].count("forward") == 2


@pytest.mark.parametrize(
    "wait", [lambda x: x.max().item(), lambda x: x[x > 0], lambda x: bool((x > 0).any()), lambda x: x.nonzero()]
)
def test_what_waits_for_the_device_is_refused(wait: Callable[[Tensor], Any]) -> None:
    with _Recorder(), pytest.raises(AssertionError, match="waits for the device"):
        wait(torch.ones(3))


# -- the tensors' device -----------------------------------------------------------------------------------------------


def _backward_of_kept(spec: CellSpec, call: Call) -> None:
    memories, activations, _ = TRITON.forward(spec, call, True)
    needs = [True, True, call.reset_memory is not None, *[True] * len(call.params)]
    TRITON.backward(spec, call, memories, activations, torch.zeros_like(memories), needs)


@pytest.mark.parametrize(
    "run, launched",
    [
        (launch.unroll, ["project"] * 3 + ["forward"]),
        (_backward_of_kept, ["project"] * 3 + ["forward_kept"] + ["project"] * 3 + ["backward"] + ["project"] * 2),
    ],
    ids=["forward", "backward"],
)
def test_everything_runs_under_the_device_of_the_tensors(
    run: Callable[[CellSpec, Call], object], launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    second = torch.device("cuda", 1)
    entered: list[torch.device] = []
    seen: list[tuple[str, list[torch.device]]] = []

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield
        entered.pop()

    def note(what: str, *rest: object) -> None:
        seen.append((what, list(entered)))

    def noted(what: str, answer: Callable[[], Any]) -> Callable[[], Any]:
        def ask() -> Any:
            note(what)
            return answer()

        return ask

    case = draw(SPECS["sonnet"], ("lengths", "resets"), dtype=torch.bfloat16)
    call = case.call()
    with _launches(monkeypatch, note), monkeypatch.context() as patched:
        for name in ("_target", "_processors"):
            patched.setattr(launch, name, noted(name, getattr(launch, name)))
        patched.setattr(torch.cuda, "device", device)
        patched.setattr(Call, "device", property(lambda self: second), raising=False)
        run(case.spec, call)
    launches, questions = [], set()
    for name, _ in seen:
        questions.add(name) if name.startswith("_") else launches.append(name)
    assert launches == launched
    assert questions == {"_target", "_processors"}
    assert all(devices == [second] for _, devices in seen)
    assert not entered


# -- torch's settings --------------------------------------------------------------------------------------------------

#: Whether this torch has `fp32_precision` beside the older flag.
NEWER = hasattr(torch.backends, "fp32_precision")
NEEDS_NEWER = pytest.mark.skipif(not NEWER, reason=f"torch {torch.__version__} has only the older flag")


@pytest.fixture
def _settings_as_they_were() -> Iterator[None]:
    owners: list[Any] = [torch.backends, torch.backends.cuda.matmul] if NEWER else []
    old = [owner.fp32_precision for owner in owners]
    yield
    torch.set_float32_matmul_precision("highest")
    for owner, value in zip(owners, old, strict=True):
        owner.fp32_precision = value


def _matmul(value: str) -> None:
    torch.backends.cuda.matmul.fp32_precision = value


def _everywhere(value: str) -> None:
    everything: Any = torch.backends
    everything.fp32_precision = value


def _flag(value: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = value


@pytest.mark.usefixtures("_settings_as_they_were")
@pytest.mark.parametrize(
    "choose, value, expected",
    [
        pytest.param(_matmul, "tf32", "tf32", marks=NEEDS_NEWER),
        pytest.param(_matmul, "ieee", "ieee", marks=NEEDS_NEWER),
        pytest.param(_everywhere, "tf32", "tf32", marks=NEEDS_NEWER),
        pytest.param(_everywhere, "ieee", "ieee", marks=NEEDS_NEWER),
        (_flag, True, "tf32"),
        (_flag, False, "ieee"),
        (torch.set_float32_matmul_precision, "high", "tf32"),
        (torch.set_float32_matmul_precision, "highest", "ieee"),
    ],
)
def test_float32_products_follow_every_way_to_set_them(
    choose: Callable[[Any], None], value: Any, expected: str
) -> None:
    choose(value)
    assert launch.precision(torch.float32) == expected
    assert launch.precision(torch.float16) == launch.precision(torch.bfloat16) == "ieee"


def test_an_older_torch_has_one_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    class Matmul:
        allow_tf32 = True

    monkeypatch.setattr(torch.backends.cuda, "matmul", Matmul)
    assert launch.precision(torch.float32) == "tf32"
    Matmul.allow_tf32 = False
    assert launch.precision(torch.float32) == "ieee"


@pytest.mark.usefixtures("_settings_as_they_were")
def test_amd_multiplies_float32_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_float32_matmul_precision("high")
    assert launch.precision(torch.float32) == "tf32"
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launch.precision(torch.float32) == "ieee"


# -- what is not served ------------------------------------------------------------------------------------------------


def test_auto_passes_over_what_is_not_served_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, here a pretended one: `sonnet` goes to Triton, `l0sg` to the next backend with the reason."""
    monkeypatch.setattr(type(TRITON), "passed_over", lambda self, device: None)
    monkeypatch.setattr(trust, "enabled", False)  # another process has no such GPU
    x = torch.zeros(1)
    with offline("sm_90"):
        assert explain(SPECS["sonnet"], x).backend == "triton"
        assert backends.choose("auto", SPECS["sonnet"], x.dtype, x.device).name == "triton"
        found = explain(SPECS["l0sg"], x)
        assert found.backend == backends.choose("auto", SPECS["l0sg"], x.dtype, x.device).name != "triton"
        assert "l0sg" in found.reasons["triton"]
        with pytest.raises(ValueError, match=r'backend "triton" cannot serve this call: the l0sg variant normalises'):
            relational_memory(**draw(SPECS["l0sg"], dtype=torch.float32).arguments(), backend="triton")


def test_parameters_past_32_bits_are_refused() -> None:
    with offline("sm_90"):
        refusal = TRITON.refuses(CellSpec.sonnet(16, 4, 4096, 4), torch.float32, torch.device("cpu"))
        assert refusal is not None
        assert "parameters" in refusal
        assert TRITON.refuses(CellSpec.sonnet(16, 4, 2048, 4), torch.float32, torch.device("cpu")) is None


def test_devices_without_bfloat16_are_refused() -> None:
    with offline("sm_75"):
        assert _refusal() == "the kernels are for sm_80 and newer, the device is sm_75"
    for target in ("sm_80", "sm_121", "gfx942"):
        with offline(target):
            assert _refusal() is None


def test_devices_of_other_makers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with offline("sm_90"):
        monkeypatch.setattr(type(driver.active), "get_current_target", lambda self: GPUTarget("xpu", {}, 32))
        assert _refusal() == "the kernels are for NVIDIA and AMD devices, Triton drives xpu"


def test_a_device_is_judged_while_it_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    second = torch.device("cuda", 1)
    entered: list[torch.device] = []
    monkeypatch.setattr(launch, "device_type", lambda: "cuda")
    monkeypatch.setattr(launch, "unfit_device", lambda: None if entered == [second] else "the wrong one")

    @contextmanager
    def device(which: torch.device) -> Iterator[None]:
        entered.append(which)
        yield
        entered.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    assert TRITON.refuses(SPECS["sonnet"], torch.float32, second) is None
    assert not entered


def _refusal() -> str | None:
    return TRITON.refuses(SPECS["sonnet"], torch.float32, torch.device("cpu"))


# -- products of the weight gradients ----------------------------------------------------------------------------------


class _Products(TorchDispatchMode):
    """Rows that each product sums one after another."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.summed: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("bmm", "mm", "addmm_"):
            self.summed.append(args[-1].shape[-2])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("rows", [0, 16, 512, 1040, 5008])
def test_float32_weight_gradients_sum_few_rows_in_a_row(rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    d, left = (torch.randn(rows, width + 3, generator=generator)[:, 3:] for width in (6, 5))
    sums = gradients.Sums({"mlp.0.weight": torch.ones(6, 5), "mlp.0.bias": torch.ones(6)})
    with _Products() as products:
        sums.linear("mlp.0", d, left)
        sums.linear("mlp.0", d, left)
    assert max(products.summed) <= gradients.SUMMED_ROWS
    for name, exact in {"weight": d.double().t() @ left.double(), "bias": d.double().sum(0)}.items():
        torch.testing.assert_close(sums.found[f"mlp.0.{name}"].double(), 2 * exact, rtol=1e-4, atol=1e-3)
