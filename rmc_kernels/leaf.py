"""What the layer, the cell and the drop-in classes are to tools: torch.fx, torch.jit.script, the older exporter."""

from __future__ import annotations

import inspect
from typing import Any, NoReturn

import torch
from torch import nn
from torch.fx import Proxy, Tracer
from torch.fx.proxy import TracerBase

from rmc_kernels.backends.plain import is_exporting_onnx

#: Arguments of a call that others have, by what takes their place here.
_INSTEAD = {
    "memory": ("hx", "h0", "c0", "h_0", "c_0", "hidden", "hidden_state", "state", "initial_state"),
    "lengths": (
        "mask", "padding_mask", "key_padding_mask", "src_key_padding_mask", "attention_mask", "length", "lens",
        "seq_lens", "seq_len", "seq_lengths", "seq_length", "sequence_length", "sequence_lengths", "input_lengths",
    ),
    "resets": ("reset", "done", "dones", "is_init", "episode_start", "episode_starts"),
    "x": ("input", "inputs", "src"),
}  # fmt: skip
_MEANING = {
    "memory": "memory, one tensor [B, N, D] in place of the (h, c) of nn.LSTM",
    "lengths": "lengths, [B]: the steps of each element before its padding",
    "resets": "resets, bool [B, T], or [B] of a cell: where an element starts over",
    "x": "the input by position",
}
_TAKEN_BY = {name: ours for ours, names in _INSTEAD.items() for name in names}


class LeafModule(nn.Module):
    """A module that tools see from outside only.

    * torch.fx records a call of it as one `call_module` node, as of nn.LSTM; its hooks are inside, and so is what a
      subclass adds.
    * torch.jit.script raises TypeError, for a model that holds one too.
    * A call with an argument of nn.LSTM's or nn.Transformer's says which of ours takes its place.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As nn.Module's, or a node in the graph that torch.fx is tracing."""
        suspect = len(args) > 2
        for value in args:
            if isinstance(value, Proxy):
                return self._traced(value.tracer, args, kwargs)
        for name, value in kwargs.items():
            if isinstance(value, Proxy):
                return self._traced(value.tracer, args, kwargs)
            suspect = suspect or name in _TAKEN_BY
        if suspect and not self._forward_pre_hooks:  # a hook may change the arguments
            complaint = self._complaint(len(args), tuple(kwargs))
            if complaint is not None:
                raise TypeError(complaint)
        return super().__call__(*args, **kwargs)

    def _traced(self, tracer: TracerBase, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of a call in the graph of `tracer`, whether it takes this module for a leaf or not."""
        if not isinstance(tracer, Tracer):  # it has no modules; `forward` says what to do
            return super().__call__(*args, **kwargs)

        def record(*args: Any, **kwargs: Any) -> Any:
            return tracer.create_proxy("call_module", tracer.path_of_module(self), args, kwargs)

        return tracer.call_module(self, record, args, kwargs)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks of each module before it compiles any."""
        raise TypeError(
            f"torch.jit.script cannot compile {type(self).__name__}; use torch.compile, torch.export.export, or "
            "torch.jit.trace under torch.no_grad()"
        )

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator] # Dynamo calls it while it traces
    def _complaint(self, positional: int, names: tuple[str, ...]) -> str | None:
        """What Python says where `forward` does not take these arguments, with the cure; None where it does."""
        signature = inspect.signature(self.forward)
        try:
            signature.bind(*range(positional), **dict.fromkeys(names))
            return None
        except TypeError as error:
            message = f"{type(self).__name__}: {error}"
        known = signature.parameters
        theirs = next((name for name in names if name in _TAKEN_BY and name not in known), None)
        if theirs is not None:
            ours = _TAKEN_BY[theirs]
            cure = "pass" if ours in known or ours == "x" else "rmc_kernels.RelationalMemory takes"
            return f"{type(self).__name__} has no argument {theirs!r}; {cure} {_MEANING[ours]}"
        if is_exporting_onnx():
            return message + '; the older exporter passes all of them so: use dynamo=True, and backend="reference"'
        named = [name for name, parameter in known.items() if parameter.kind is parameter.KEYWORD_ONLY]
        return message + (f"; pass {', '.join(named)} by name" if named else "")
