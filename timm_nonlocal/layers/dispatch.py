"""Which of the ways to compute a block or stage is right for a call.

The fast ways read the children's weights and call our operator. Hooks, adapters, old-style reparametrisations, shards,
quantised layers and wrappers all work through a child's call, or put another child there: `is_map` and `untouched` say
where reading would pass them by. Graphs for other runtimes hold plain tensor code only, and transforms take no other.
"""

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ['is_map', 'only_plain_tensor_code', 'transforming', 'untouched']


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module is the forward of its class and nothing else: no hook, no wrapper, no other forward."""
    return (getattr(module.forward, '__func__', None) is kind.forward
            and not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                     or module._backward_pre_hooks))


def is_map(module: nn.Module, x: Tensor) -> bool:
    """Whether calling a module is x Wᵀ with W its `weight`, a plain tensor where x is, or made by a parametrisation."""
    if not untouched(module, nn.Linear) or module.bias is not None:
        return False
    if is_parametrized(module, 'weight'):
        return True
    weight = module.weight
    return isinstance(weight, Tensor) and not is_traceable_wrapper_subclass(weight) and (
        isinstance(x, torch.fx.Proxy) or weight.device == x.device)


def transforming() -> bool:
    """Whether torch.func transforms or forward mode differentiates, for which our operator has no rule."""
    return torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0


def only_plain_tensor_code(x: Tensor) -> bool:
    """No operator of ours: a graph is being made that other runtimes read, or a transform has no rule for it."""
    return (isinstance(x, torch.fx.Proxy) or x.is_meta or torch.jit.is_tracing() or torch.compiler.is_exporting()
            or transforming())
