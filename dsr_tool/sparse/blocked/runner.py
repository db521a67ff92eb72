"""Runner: a compact network's forward pass on the kernels, with autograd, in training and in evaluation."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dsr_tool.runtime.kernels.training import available
from dsr_tool.sparse.blocked.coverage import Coverage
from dsr_tool.sparse.blocked.fingerprint import Fingerprint
from dsr_tool.sparse.blocked.plans import Plans
from dsr_tool.sparse.blocked.program import Program
from dsr_tool.sparse.blocked.trace import NotTraceableError, trace
from dsr_tool.sparse.compact.store import CompactStore

__all__ = ["Runner"]

_GLOBAL_HOOKS = (
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
)
"""Names under which torch keeps the hooks of all modules; 2.6 has no function that asks for them."""


class Runner:
    """Runs a network with sparse weights on the kernels.

    The network is traced once for each of its modes and kinds of arguments, and again when its modules or their
    settings change. Copies and pickles of a runner are not traced.

    Attributes:
        plans: plans of the kernels for the layers of this network.
        note: why the last call that was not accepted was not; empty if it was.
    """

    def __init__(self, module: nn.Module, store: CompactStore) -> None:
        """Keeps the network; nothing is traced yet.

        Args:
            module: the root module, in compact storage.
            store: its sparse weights.
        """
        self._module, self._store = module, store
        self._reset()

    def _reset(self) -> None:
        self.plans, self.note = Plans(), ""
        self._programs: dict[Hashable, Program | str] = {}
        self._fingerprint: Fingerprint | None = None
        self._last: Program | None = None
        self._ready = threading.local()

    def __getstate__(self) -> dict[str, Any]:
        """Keeps the network alone."""
        return {"_module": self._module, "_store": self._store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Starts untraced."""
        self.__dict__.update(state)
        self._reset()

    def accepts(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Returns whether the network can run on the kernels with these arguments; if not, `note` says why."""
        found = self._find(args, kwargs)
        if isinstance(found, str):
            self.note = found
            return False
        self.note, self._ready.call = "", (args, kwargs, found)
        return True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the network's result; arguments are those of its `forward`.

        Raises:
            ValueError: if it does not accept them.
        """
        before = self._ready.__dict__.pop("call", None)
        found = before[2] if before is not None and _same(before, args, kwargs) else self._find(args, kwargs)
        if isinstance(found, str):
            raise ValueError(f"the network cannot run on kernels: {found}.")
        self._last, tensors = found
        with self._store.forward():
            return self._last(tensors)

    @property
    def coverage(self) -> Coverage | None:
        """Where the steps of the program ran that was called last; None before the first call."""
        return None if self._last is None else self._last.coverage

    def _find(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Program, list[Tensor]] | str:
        """Returns the program for a call and the tensors that it takes, or why there is none."""
        if reason := self._unfit():
            return reason
        leaves: list[Any]
        kinds: tuple[Hashable, ...] = ()
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            leaves, spec = [args[0]], _ONE
        else:
            leaves, spec = pytree.tree_flatten((args, kwargs))
            kinds = (str(spec), *(None if isinstance(leaf, Tensor) else leaf for leaf in leaves))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for tensor in tensors:
            if reason := _unfit_tensor(tensor):
                return reason
        key = (kinds, self._state())
        try:
            program = self._programs.get(key)
        except TypeError:
            # A setting may have become a list, say; next time it does not count as one.
            self._fingerprint = None
            return "an argument or a setting of a module is neither a tensor nor a constant"
        if program is None:
            program = self._programs[key] = self._traced(leaves, spec)
        return program if isinstance(program, str) else (program, tensors)

    def _unfit(self) -> str:
        """Returns what is against kernels, whatever the arguments; an empty text if nothing is."""
        store = self._store
        if not store.kernels:
            return "kernels are switched off"
        if store.wants_gradients:
            return "the method asks for gradients of inactive weights"
        if not available():
            return "there are no compiled kernels"
        if store.values.dtype is not torch.float32 or store.values.device.type != "cpu":
            return f"kernels take float32 on the CPU, and its weights are {store.values.dtype} on {store.values.device}"
        return _unfit_torch()

    def _state(self) -> tuple[Hashable, ...]:
        if self._fingerprint is None or self._fingerprint.outdated():
            self._programs.clear()
            self._fingerprint = Fingerprint(self._module)
        return self._fingerprint.state()

    def _traced(self, leaves: list[Any], spec: pytree.TreeSpec) -> Program | str:
        odd = [
            f"{name} is {tensor.dtype} on {tensor.device}"
            for name, tensor in (*self._module.named_parameters(), *self._module.named_buffers())
            if tensor.is_floating_point() and (tensor.dtype is not torch.float32 or tensor.device.type != "cpu")
        ]
        if odd:
            return f"kernels take float32 on the CPU, and {odd[0]}"
        try:
            graph = trace(self._module, self._store, leaves, spec)
            return Program(self._module, self._store, self.plans, graph)
        except NotTraceableError as error:
            return f"the network cannot be traced: {error}"


_ONE = pytree.tree_flatten(((torch.empty(0),), {}))[1]
"""How one tensor is put together into the arguments of a call."""


def _same(before: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns whether a call that was accepted had the very same arguments."""
    known_args, known_kwargs, _ = before
    return (
        len(known_args) == len(args)
        and known_kwargs.keys() == kwargs.keys()
        and all(one is other for one, other in zip(known_args, args, strict=True))
        and all(known_kwargs[key] is value for key, value in kwargs.items())
    )


def _unfit_tensor(tensor: Tensor) -> str:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
        return f"an argument is a {type(tensor).__name__} of layout {tensor.layout}"
    if tensor.device.type != "cpu" or (tensor.is_floating_point() and tensor.dtype is not torch.float32):
        return f"kernels take float32 on the CPU, and an argument is {tensor.dtype} on {tensor.device}"
    if tensor.is_complex() or tensor.is_quantized:
        return f"an argument is {tensor.dtype}"
    return "" if tensor.numel() else "an argument is empty"


def _is_fx_tracing() -> bool:
    """Returns whether torch.fx traces a module symbolically; older versions have another name for the question."""
    fx = torch.fx._symbolic_trace
    traces: bool = (fx.is_fx_symbolic_tracing if hasattr(fx, "is_fx_symbolic_tracing") else fx.is_fx_tracing)()
    return traces


def _unfit_torch() -> str:
    """Returns which of torch's modes needs the network's own forward, or an empty text."""
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch._C._get_tracing_state() is not None or torch.compiler.is_compiling() or _is_fx_tracing():
        return "it is being traced or compiled"
    if torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack():
        return "a mode of torch watches every operation"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func is at work"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode derivatives are wanted"
    if any(getattr(nn.modules.module, name) for name in _GLOBAL_HOOKS):
        return "there are hooks on all modules"
    return ""
