"""Derivatives by `torch.func`, by forward mode and by `torch.autograd.functional`, against the literal formula's."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torch.autograd import forward_ad, functional
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from timm_nonlocal import NonlocalBlock, NonlocalStage
from timm_nonlocal.ops.stage import nonlocal_stage

C = 4
Function = Callable[[torch.Tensor], torch.Tensor]
MAKE = pytest.mark.parametrize('make', [
    lambda: NonlocalStage(C, 2),
    lambda: NonlocalStage(C, 2, recompute=True, affinity='gaussian'),
    lambda: NonlocalStage(C, 2, symmetric=True, stable=True),
    lambda: NonlocalStage(C, 2, affinity='positive_dot_product'),
    lambda: NonlocalBlock(C),
    lambda: NonlocalBlock(C, affinity='concatenation'),
], ids=['stage', 'recompute', 'stable', 'dot product', 'block', 'concatenation'])


def cubes(f: Function) -> Function:
    return lambda x: (f(x) ** 3).sum()


def dual(f: Function, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, t))).tangent


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def as_literal(network: nn.Module, f: Callable[[], Any]) -> Any:
    """f() while every nonlocal module follows its equation, by plain autograd."""
    modules = [module for module in network.modules() if isinstance(module, (NonlocalStage, NonlocalBlock))]
    for module in modules:
        module.merged = False
    expected = f()
    for module in modules:
        module.merged = True
    return expected


@MAKE
def test_jacobians(make: Callable[[], nn.Module]) -> None:
    module, x = make().double(), torch.randn(2, C, 2, 3, dtype=torch.float64)
    t = torch.randn_like(x)
    j = as_literal(module, lambda: functional.jacobian(module, x))  # (*x.shape, *x.shape)
    for whole in (jacrev, jacfwd, lambda f: lambda x: functional.jacobian(f, x),
                  lambda f: lambda x: functional.jacobian(f, x, vectorize=True),
                  lambda f: lambda x: functional.jacobian(f, x, vectorize=True, strategy='forward-mode')):
        close(whole(module)(x), j)
    for forward in (jvp(module, (x,), (t,))[1], linearize(module, x)[1](t), dual(module, x, t)):
        close(forward, torch.tensordot(j, t, 4))
    for backward in (vjp(module, x)[1](t)[0], grad(lambda x: (module(x) * t).sum())(x)):
        close(backward, torch.tensordot(t, j, 4))


@MAKE
def test_hessians(make: Callable[[], nn.Module]) -> None:
    module, x = make().double(), torch.randn(1, C, 2, 2, dtype=torch.float64)
    expected = as_literal(module, lambda: functional.hessian(cubes(module), x))
    close(hessian(cubes(module))(x), expected)
    close(jacrev(jacrev(cubes(module)))(x), expected)
    close(functional.hessian(cubes(module), x), expected)


@MAKE
def test_many_at_once(make: Callable[[], nn.Module]) -> None:
    """`vmap`, and gradients by the parameters of every image."""
    module, x = make().double(), torch.randn(3, C, 2, 3, dtype=torch.float64)
    parameters: dict[str, torch.Tensor] = dict(module.named_parameters())

    def loss(parameters: dict[str, torch.Tensor], image: torch.Tensor) -> torch.Tensor:
        return functional_call(module, parameters, (image[None],)).square().sum()

    close(vmap(lambda image: module(image[None])[0])(x), module(x))
    each, whole = vmap(grad(loss), in_dims=(None, 0))(parameters, x), grad(loss)(parameters, x[0])
    for i, image in enumerate(x):
        gradients = as_literal(module, lambda: torch.autograd.grad(
            module(image[None]).square().sum(), list(parameters.values())))  # noqa: B023 (it is called at once)
        for name, expected in zip(parameters, gradients, strict=True):
            close(each[name][i], expected)
            assert i or torch.allclose(whole[name], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('name', ['preresnet20_nl_proposed_k2', 'preresnet20_nl_original_k1'])
def test_networks(name: str) -> None:
    model = timm.create_model(name).eval().double()
    x, t = torch.randn(2, 2, 3, 8, 8, dtype=torch.float64)
    gradient, = as_literal(model, lambda: functional.jacobian(lambda x: model(x).square().sum(), (x,)))
    close(grad(lambda x: model(x).square().sum())(x), gradient)
    y, dy = jvp(model, (x,), (t,))  # type: ignore[misc]  # three with has_aux alone
    close((2 * y * dy).sum(), (gradient * t).sum())
    close(vmap(lambda image: model(image[None])[0])(x), model(x))


@pytest.mark.parametrize(('make', 'transform'), [
    (lambda: NonlocalStage(C, 2), jacrev), (lambda: NonlocalBlock(C), jacfwd),
    (lambda: NonlocalStage(C, 2), lambda f: lambda x: dual(f, x, torch.ones_like(x))),
], ids=['reverse', 'forward', 'dual'])
def test_compiled_transforms(make: Callable[[], nn.Module], transform: Callable[[Function], Any]) -> None:
    torch.compiler.reset()
    module, x = make().double(), torch.randn(1, C, 2, 2, dtype=torch.float64)
    close(torch.compile(transform(module), backend='aot_eager', fullgraph=True)(x), transform(module)(x))


@pytest.mark.parametrize('formulation', ['proposed', 'original'])
def test_the_operators_function(formulation: str) -> None:
    """Without a module around it; a tangent was zero."""
    x, t, *weights = (torch.randn(shape, dtype=torch.float64) for shape in [(2, 5, C)] * 2 + [(2, C)] * 4)

    def f(x: torch.Tensor) -> torch.Tensor:
        theta, phi, *w_g = weights
        return nonlocal_stage(x, [theta, phi], w_g, [w.mT for w in w_g], 0.5, formulation=formulation)

    j = functional.jacobian(f, x)
    close(jvp(f, (x,), (t,))[1], torch.tensordot(j, t, 3))
    close(dual(f, x, t), torch.tensordot(j, t, 3))
    close(vjp(f, x)[1](t)[0], torch.tensordot(t, j, 3))
    close(vmap(lambda image: f(image[None])[0])(x), f(x))


def test_weights_that_are_made_of_x() -> None:
    """What reaches x through them counts once, also where the gradient is to be differentiated again."""
    x, w = torch.randn(1, 5, C, dtype=torch.float64, requires_grad=True), torch.randn(2, C, dtype=torch.float64)
    loss = nonlocal_stage(x, [], [w * x.mean()], [w.mT * x.sum()], 0.3).square().sum()
    expected, = torch.autograd.grad(loss, x, retain_graph=True)
    close(torch.autograd.grad(loss, x, create_graph=True)[0].detach(), expected)
