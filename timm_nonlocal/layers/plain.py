"""When a module is no more than its weight, so that whoever reads the weight need not call the module."""

import torch
import torch.nn.modules.module as torch_module
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils.module_tracker import ModuleTracker

__all__ = ['global_hooks', 'hooked', 'is_plain', 'transforming']

TENSORS = Tensor, nn.Parameter, FakeTensor  # others, such as DTensor, bring rules of their own


def hooked(module: nn.Module) -> bool:
    """Whether its call does something beside its class's forward: a hook, or a forward of its own, as accelerate's."""
    return bool(module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks
                or module._backward_hooks or 'forward' in module.__dict__)


def global_hooks() -> bool:
    """Whether there are hooks of all modules, but for those with which torch's counters note names."""
    return bool(torch_module._global_backward_pre_hooks or torch_module._global_backward_hooks) or any(
        not isinstance(getattr(hook, '__self__', None), ModuleTracker)
        for hooks in (torch_module._global_forward_pre_hooks, torch_module._global_forward_hooks)
        for hook in hooks.values())


def is_plain(module: nn.Module | None) -> bool:
    """Whether it is an `nn.Linear` without bias, perhaps parametrised, and its call is x Wᵀ and nothing else."""
    kind = type(module)
    if kind is nn.Linear:
        weight = module._parameters.get('weight', module.__dict__.get('weight'))
        return module.bias is None and type(weight) in TENSORS and not hooked(module)
    if kind.__bases__ == (nn.Linear,) and 'parametrizations' in module._modules:  # torch's class for this one module
        return (module.bias is None and not hooked(module)
                and all(type(tensor) in TENSORS for tensor in module.parameters()))
    return False


def transforming() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is going on."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
