"""What the drop-in classes share: a cell of ours behind an original's own modules, names and order of parameters.

A drop-in class holds the modules of its original and computes what calls of them compute. Where all are stock modules
of torch.nn, the weights say everything and a fused backend runs the sequence. Otherwise the class goes step by step in
PyTorch, through the original's methods, and calls the modules one by one.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rmc_kernels import backends, errors, initial
from rmc_kernels.backends import HALF_TYPES
from rmc_kernels.backends.plain import PLAIN_TYPES
from rmc_kernels.compat import mapping
from rmc_kernels.compat.mapping import LEAVES
from rmc_kernels.functional import compute_dtype, memory_dtype, relational_memory
from rmc_kernels.leaf import LeafModule
from rmc_kernels.module import weight
from rmc_kernels.spec import LAYER_NORM_EPS, CellSpec

if TYPE_CHECKING:
    from typing_extensions import Self

_QUANTIZED = ("torch.ao.nn.", "torch.nn.quantized.", "torch.nn.intrinsic.", "torch.nn.qat.")


class Part(NamedTuple):
    """A module of the original.

    Attributes:
        path: the attributes that lead to the module.
        stock: the original's class there.
        parameters: names of its parameters, each with that of the spec's parameter of the same shape.
    """

    path: tuple[str, ...]
    stock: type[nn.Module]
    parameters: tuple[tuple[str, str], ...]


def part(path: str, stock: type[nn.Module], layer: str = "") -> Part:
    """The module at a dotted path; `layer` is the spec's of the same shapes."""
    parameters = tuple((leaf, f"{layer}.{leaf}") for leaf in LEAVES) if layer else ()
    return Part(tuple(path.split(".")), stock, parameters)


class Port(LeafModule):
    """Base of the drop-in classes; holds the spec and the backend, and runs the sequence.

    A subclass registers the original's modules in the original's order, so that state_dicts, optimizer states (which go
    by position) and initial draws from one seed are the original's.

    Args:
        spec: the cell.
        backend: "auto", "triton", "cpu" or "reference"; see `explain`.
    """

    spec: CellSpec
    backend: str
    #: Holds an entry once `_tell` has warned. A list, so that the replicas of nn.DataParallel share it.
    _told: list[bool]
    #: The original's methods that its `forward` goes through, by name: `forward_step`, then what that calls.
    _METHODS: ClassVar[Mapping[str, Callable[..., Any]]]
    #: The classes of the original's modules, each with its `forward` as it was when this package was imported.
    _FORWARDS: ClassVar[Sequence[tuple[type[nn.Module], Callable[..., Any]]]]
    #: Names of the modules and parameters that the original registers on itself.
    _CONTENTS: ClassVar[Set[str]]

    def __init__(self, spec: CellSpec, backend: str) -> None:
        super().__init__()
        errors.one_of("backend", backend, backends.CHOICES)
        self.spec, self.backend, self._told = spec, backend, []
        for name, value in self._original_sizes(spec).items():
            setattr(self, name, value)

    def extra_repr(self) -> str:
        """The backend; sizes are in the modules below."""
        return f"backend={self.backend!r}"

    @classmethod
    @abstractmethod
    def _spec_of(cls, core: nn.Module) -> CellSpec:
        """The cell of a module with the original's attributes; where one is missing, from the shapes of its weights.

        Raises:
            ValueError: what is missing is not in the shapes.
        """

    @classmethod
    @abstractmethod
    def _made_like(cls, core: nn.Module, backend: str) -> Self:
        """A module of this class with the sizes of `core`, which has the original's attributes."""

    @classmethod
    @abstractmethod
    def _original_sizes(cls, spec: CellSpec) -> dict[str, Any]:
        """The original's attributes that are neither modules nor parameters."""

    @abstractmethod
    def _stock_parts(self) -> Sequence[Part]:
        """Where the modules are that the original's step calls; a container comes before its contents."""

    @abstractmethod
    def _changed_sizes(self) -> list[str]:
        """What differs from the original in attributes, parameters and counts of modules, each as a clause."""

    @abstractmethod
    def _spec_parameters(self) -> dict[str, Tensor]:
        """The parameters under the names of the spec."""

    # -- Whether the weights say everything -----------------------------------------------------------------------

    def _is_stock(self, methods: Mapping[str, Callable[..., Any]]) -> bool:
        """Whether the original's methods of these names, and calls of its modules, are the ones that the spec is of.

        Warns once where they are not. Takes 8 us for l0sg, 11 us for r2gen.

        Raises:
            ValueError: quantised modules; parameters of another shape.
        """
        departures = self._departures(methods)
        if not departures:
            return True
        self._refuse_other_shapes()
        if not self._told:
            self._tell(departures)
        return False

    def _departures(self, methods: Mapping[str, Callable[..., Any]]) -> list[str]:
        """What makes a call compute something else than the spec, each as a clause."""
        found: list[str] = []
        for name, function in methods.items():
            if name in self.__dict__ or getattr(type(self), name) is not function:
                found.append(f"the method {name} is overridden")
        if (
            global_hooks._global_forward_pre_hooks
            or global_hooks._global_forward_hooks
            or global_hooks._global_backward_pre_hooks
            or global_hooks._global_backward_hooks
        ):
            found.append("a hook on all modules is registered")
        for cls, forward in self._FORWARDS:
            if cls.forward is not forward:
                found.append(f"{qualified(cls)}.forward was replaced")
        departed = set()
        for path, stock, parameters in self._stock_parts():
            module = _at(self, path)
            departure = _departure(module, stock, bool(parameters))
            if departure is not None and not any(path[:depth] in departed for depth in range(1, len(path))):
                departed.add(path)  # a module that departs sees to its own contents
                dotted = ".".join(path)
                refuse_quantized(module, dotted)
                found.append(f"{dotted} {departure}")
        return found + self._changed_sizes()

    def _overrides(self, method: str) -> bool:
        """Whether a method of the original is another one in a subclass or on the instance."""
        return method in self.__dict__ or getattr(type(self), method) is not self._METHODS[method]

    def _refuse_other_shapes(self) -> None:
        """Raise ValueError where a stock module has a parameter of another shape than the spec's."""
        shapes = self.spec.parameter_shapes
        for path, stock, parameters in self._stock_parts():
            module = _at(self, path)
            for leaf, like in parameters if type(module) is stock else ():
                value = module._parameters.get(leaf)  # type: ignore[union-attr]
                if value is not None and value.shape != shapes[like]:
                    raise ValueError(
                        f"{'.'.join(path)}.{leaf} must be of shape {shapes[like]}, as when the class was made, got "
                        f"{tuple(value.shape)}"
                    )

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # Dynamo calls it while it traces
    def _tell(self, departures: Sequence[str]) -> None:
        self._told.append(True)
        warnings.warn(
            f"{qualified(type(self))} runs step by step in PyTorch, since {'; '.join(departures)}. On a CPU that takes "
            "1.2 to 4 times as long at batch size 16, and 4 to 17 times at 1. To use the fused kernels again, merge "
            "adapters and remove hooks; from_module converts a module that computes the same",
            RuntimeWarning,
            stacklevel=8,  # the caller of a module
        )

    # -- Arguments ------------------------------------------------------------------------------------------------

    def _identity(self, batch_size: int) -> Tensor:
        """The identity memory [B, N, D] on the parameters' device; float32 for half types."""
        if not torch.compiler.is_compiling():  # there it is symbolic
            errors.positive_int("batch_size", batch_size, minimum=0)
        like = self._like()
        return initial.memory("identity", self.spec, batch_size, like.device, memory_dtype(like.dtype))

    def _like(self) -> Tensor:
        """A parameter of the dtype in which inputs come; l0sg's 0-d ones may stay in another (FSDP2)."""
        for module in children(self).values():
            value = None if module is None else module._parameters.get("weight")
            if value is not None:
                return value
        for value in self.parameters():
            if value.dim():
                return value
        for value in (value for module in self.modules() for value in vars(module).values()):
            if isinstance(value, Tensor) and value.dim():  # in a replica of nn.DataParallel
                return value
        self._departures({})  # refuses quantised modules
        raise ValueError(f"{type(self).__name__} must hold parameters, for their dtype and device; it holds none")

    def _checked_rows(self, name: str, value: Tensor, axes: int, features: int | None) -> Tensor:
        """An input [B, T, I] (2 axes) or [B, I] (1), checked; like the originals, flattened behind these axes.

        Where another module takes it, how many `features` I it has may be that module's business (None), and its dtype.
        """
        layout = f"[{'B, T' if axes == 2 else 'B'}, {'...' if features is None else features}]"
        errors.is_tensor(name, value, f"a tensor {layout}")
        if value.dim() < axes or (features is not None and math.prod(value.shape[axes:]) != features):
            raise ValueError(f"{name} must be {layout}, got {tuple(value.shape)}")
        rows = value.reshape(*value.shape[:axes], math.prod(value.shape[axes:]))
        if features is None:
            return rows
        like = self._like()
        if not value.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor, got {errors.describe(value)}")
        if value.device != like.device or (
            value.dtype != like.dtype
            and compute_dtype(value) == value.dtype
            and all(value.dtype != other.dtype for other in self.parameters() if other.dim())  # adapters may differ
        ):
            raise TypeError(
                f"{name} must have the parameters' {like.dtype} on {like.device}, got {value.dtype} on {value.device}"
            )
        return rows

    def _checked_memory(self, memory: Tensor, x: Tensor) -> Tensor:
        """A memory [B, N, D] for an input x [B, ...], checked, and widened to the dtype in which it is carried."""
        shape = (x.shape[0], self.spec.mem_slots, self.spec.mem_size)
        layout = f"[B, {shape[1]}, {shape[2]}]"
        errors.is_tensor("memory", memory, f"a tensor {layout}")
        if memory.shape != shape:
            raise ValueError(f"memory must be {layout} with B = {shape[0]}, got {tuple(memory.shape)}")
        dtype = memory_dtype(compute_dtype(x) if x.is_floating_point() else memory.dtype)
        memory = memory.to(torch.promote_types(memory.dtype, dtype))
        if memory.dtype != dtype or memory.device != x.device:
            raise TypeError(f"memory must be {dtype} on {x.device}, got {memory.dtype} on {memory.device}")
        return memory

    def _run_kernel(self, x: Tensor, memory: Tensor, dropout_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Outputs [B, T, N * D] in the dtype x is computed in, and the last memory, by a backend."""
        memory = self._checked_memory(memory, x)
        try:
            memories, final = relational_memory(
                x, memory, self._spec_parameters(), self.spec, dropout_mask=dropout_mask, backend=self.backend
            )
        except (ValueError, RuntimeError):
            self._refuse_other_shapes()  # in the original's names
            raise
        return memories.flatten(2).to(compute_dtype(x)), final

    # -- Pickles and state_dicts ----------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        state.pop("_told", None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickle of this class, of an older version of it, or of the original class."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._told = []
        if "spec" not in state:
            self._refuse_other_contents()
            self.spec, self.backend = self._spec_of(self), "auto"
        for name, value in self._original_sizes(self.spec).items():
            self.__dict__.setdefault(name, value)

    def _refuse_other_contents(self) -> None:
        """Raise ValueError where a pickle, of another class, holds more or less than this class does."""
        if not type(self).__module__.startswith("rmc_kernels."):
            return  # a subclass sees to what it adds
        held = {*self._modules, *self._parameters, *self._buffers}
        if held != self._CONTENTS:
            raise ValueError(
                f"a pickled {type(self).__name__} must hold what {type(self).__module__}.{type(self).__name__} does; "
                f"missing: {sorted(self._CONTENTS - held)}, unknown: {sorted(held - self._CONTENTS)}. Another class "
                "was saved, which computes something else: load the file with that class and pass the module to "
                f"{type(self).__module__}.from_module, or make that class a subclass of this one"
            )

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        """As nn.Module's, but refuses two values for one parameter, of which the last would win silently."""
        first: dict[int, str] = {}
        for name, value in self.named_parameters(prefix.removesuffix("."), remove_duplicate=False):
            other = first.setdefault(id(value), name)
            if other != name and not mapping.agree(state_dict, other, name):
                raise ValueError(f"state_dict {mapping.disagreement(other, name)}")
        super()._load_from_state_dict(state_dict, prefix, *rest)


def attribute(core: nn.Module, name: str, otherwise: Callable[[], Any] | None = None) -> Any:
    """An attribute of a module of the original's class, or what `otherwise` gives for it."""
    if hasattr(core, name):
        return getattr(core, name)
    if otherwise is None:
        raise ValueError(
            f"a {qualified(type(core))} must have the original's attribute {name!r}, which its weights do not tell; it "
            "has none: make a new module of the same sizes, and load the state_dict of this one"
        )
    return otherwise()


def narrowed(memory: Any, x: Tensor) -> Any:
    """A memory for an overriding `forward_step`, which like the original's knows one dtype: x's, for half types."""
    return memory.to(x.dtype) if isinstance(memory, Tensor) and x.dtype in HALF_TYPES else memory


def widened(memory: Any) -> Any:
    """A memory that an overriding `forward_step` returned, in the dtype in which `forward` returns memories."""
    return memory.float() if isinstance(memory, Tensor) and memory.dtype in HALF_TYPES else memory


def in_computed_dtype(outputs: Tensor, x: Tensor) -> Tensor:
    """Outputs in the dtype in which x is computed with; those of integer inputs are left as they are."""
    return outputs.to(compute_dtype(x)) if x.is_floating_point() else outputs


def forwards(*classes: type[nn.Module]) -> Sequence[tuple[type[nn.Module], Callable[..., Any]]]:
    """Each class with its `forward`."""
    return tuple((cls, cls.forward) for cls in classes)


def children(module: nn.Module) -> dict[str, nn.Module | None]:
    """The modules that a module holds; torch.export's tracer has proxies of other classes for them in `_modules`."""
    held: dict[str, nn.Module | None] = module.__dict__["_modules"]
    return held


def _at(module: nn.Module | None, path: tuple[str, ...]) -> nn.Module | None:
    """The module at a path, or None."""
    for name in path:
        module = None if module is None else module.__dict__["_modules"].get(name)
    return module


def weights(owners: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The weight and the bias of each module, under the spec's name of it."""
    found: dict[str, Tensor] = {}
    for name, owner in owners.items():
        for leaf in LEAVES:
            value = owner._parameters.get(leaf)  # nn.Module.__getattr__ takes 1 us
            found[f"{name}.{leaf}"] = weight(owner, leaf) if value is None else value
    return found


def _departure(module: nn.Module | None, stock: type[nn.Module], holds_weights: bool) -> str | None:
    """How a call of a module may differ from that of a stock module of this class; None where it does not."""
    if module is None:
        return "is not a module"
    cls = type(module)
    if cls is not stock and not _is_parametrized_only(module, stock):
        return f"is a {qualified(cls)}, not a {qualified(stock)}"
    if stock is nn.ModuleList:  # never called
        return None
    if module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return "has a hook"
    if "forward" in module.__dict__ or module._compiled_call_impl is not None:
        return "has a forward of its own"
    if (module._forward_pre_hooks or cls is not stock) and not _recomputes_weights(module):
        return "has a hook or a parametrization whose result may change from call to call"
    if holds_weights:
        held = module._parameters
        if type(held.get("weight")) not in PLAIN_TYPES or type(held.get("bias")) not in PLAIN_TYPES:
            for leaf in LEAVES:
                departure = unusual_parameter(module, leaf)
                if departure is not None:
                    return departure
        if stock is nn.LayerNorm and module.eps != LAYER_NORM_EPS:
            return f"has eps={module.eps}, not {LAYER_NORM_EPS}"
    return None


def unusual_parameter(module: nn.Module, leaf: str) -> str | None:
    """What is unusual about a parameter: that there is none, or that its tensor class may compute anything."""
    value = module._parameters.get(leaf)
    if value is None:  # computed by a hook or a parametrization, a buffer, or what nn.DataParallel leaves of it
        plain = module.__dict__.get(leaf, module._buffers.get(leaf))
        known = isinstance(plain, Tensor) or is_parametrized(module, leaf)
        return None if known and leaf not in module._parameters else f"has no {leaf}"
    usual = type(value) in PLAIN_TYPES or type(value).__module__.startswith("torch.")
    return None if usual else f"has a {qualified(type(value))} for its {leaf}"


def _is_parametrized_only(module: nn.Module, stock: type[nn.Module]) -> bool:
    """Whether a module is of the class that torch.nn.utils.parametrize derives from `stock`."""
    cls = type(module)
    return is_parametrized(module) and cls.__base__ is stock and "forward" not in vars(cls)


def recomputes_weight(hook: object, training: bool = False) -> bool:
    """Whether all that a pre-hook does is to compute a weight, the same one until the next update.

    So do pruning and the older weight_norm; the older spectral_norm refines an estimate at each call in training.
    """
    return isinstance(hook, (BasePruningMethod, WeightNorm)) or (isinstance(hook, SpectralNorm) and not training)


def _recomputes_weights(module: nn.Module) -> bool:
    """Whether this holds of a module's pre-hooks and parametrizations."""
    if not all(recomputes_weight(hook, module.training) for hook in module._forward_pre_hooks.values()):
        return False
    if not is_parametrized(module):
        return True
    lists: Any = module.parametrizations
    parts = [part for parametrized in lists.values() for part in parametrized]
    return all(type(part).__module__ == parametrizations.__name__ for part in parts) and not any(
        part.training and [*part.buffers()]
        for part in parts  # spectral_norm's estimate
    )


def refuse_quantized(module: nn.Module | None, name: str) -> None:
    """Raise ValueError for a quantised module or one that contains any; `name` leads to it."""
    for inner, part in () if module is None else module.named_modules(prefix=name):
        if any(cls.__module__.startswith(_QUANTIZED) for cls in type(part).__mro__):
            raise ValueError(
                f"quantised modules are not supported: {inner} is a {qualified(type(part))}; leave this class out, by "
                "naming the modules to quantise: quantize_dynamic(model, {'decoder': default_dynamic_qconfig})"
            )


def qualified(cls: type) -> str:
    """The full name of a class."""
    home = "torch.nn" if cls.__module__.startswith("torch.nn.modules.") else cls.__module__
    return f"{home}.{cls.__qualname__}"
