"""When a module is no more than its weight, which can then be read instead, and when our operator may be called."""

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.utils.module_tracker import ModuleTracker

from ..ops import stage

__all__ = ['global_hooks', 'hooked', 'is_plain', 'only_tensor_code', 'transforming']

TENSORS = Tensor, nn.Parameter, FakeTensor  # others, such as DTensor, bring rules of their own


def hooked(module: nn.Module) -> bool:
    """Whether its call does something beside its class's forward: a hook, or a forward of its own, as accelerate's."""
    count = (len(module._forward_pre_hooks) + len(module._forward_hooks) + len(module._backward_pre_hooks)
             + len(module._backward_hooks))
    return count > 0 or 'forward' in module.__dict__


def global_hooks() -> bool:
    """Whether there are hooks of all modules, but for those with which torch's counters note names."""
    return bool(torch_module._global_backward_pre_hooks or torch_module._global_backward_hooks) or any(
        not isinstance(getattr(hook, '__self__', None), ModuleTracker)
        for hooks in (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
        for hook in hooks.values())


def is_plain(module: nn.Module) -> bool:
    """Whether it is an `nn.Linear` without bias, perhaps parametrised, and its call is x Wᵀ and nothing else."""
    kind, own = type(module), module._parameters
    if kind is nn.Linear:
        weight = own['weight'] if 'weight' in own else module.__dict__.get('weight')
        return type(weight) in TENSORS and module.bias is None and not hooked(module)
    if kind.__bases__ == (nn.Linear,) and 'parametrizations' in module._modules:  # torch's class for this one module
        return (module.bias is None and not hooked(module)
                and all(type(tensor) in TENSORS for tensor in module.parameters()))
    return False


def transforming() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is going on."""
    if torch.jit.is_scripting():
        return False
    return stage.transforming()


def only_tensor_code(x: Tensor) -> bool:
    """A graph is being made that other runtimes read, or a function transform is active: ours has rules for neither."""
    return (isinstance(x, torch.fx.Proxy) or x.is_meta or torch.jit.is_tracing() or torch.compiler.is_exporting()
            or transforming())
