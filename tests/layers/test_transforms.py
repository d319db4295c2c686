"""Derivatives of every kind: transforms of torch.func, forward mode, and gradients of gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from timm_nonlocal import NonlocalBlock, NonlocalStage

MAKE: dict[str, Callable[..., nn.Module]] = {
    'stage': lambda **kwargs: NonlocalStage(4, 3, **kwargs),
    'block': lambda **kwargs: NonlocalBlock(4, **kwargs),
    'gaussian': lambda **kwargs: NonlocalBlock(4, affinity='gaussian', **kwargs),
    'stable': lambda **kwargs: NonlocalStage(4, 3, symmetric=True, stable=True, **kwargs),
    'dot product': lambda **kwargs: NonlocalStage(4, 2, affinity='dot_product', **kwargs),
}


@pytest.fixture(params=MAKE)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A module, and the same by the equations as they stand."""
    torch.manual_seed(0)
    module, plain = MAKE[request.param]().double(), MAKE[request.param](merged=False).double()
    plain.load_state_dict(module.state_dict())
    return module, plain


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def expected(plain: nn.Module, image: Tensor) -> Tensor:
    """The Jacobian by plain backward passes."""
    return torch.autograd.functional.jacobian(plain, image)


@pytest.mark.parametrize('transform', [jacrev, jacfwd])
def test_jacobians(pair: tuple[nn.Module, nn.Module], transform: Callable) -> None:
    image = x(1, 4, 3, 2)
    close(transform(pair[0])(image), expected(pair[1], image))


def test_jacobians_of_autograd(pair: tuple[nn.Module, nn.Module]) -> None:
    image = x(1, 4, 3, 2)
    for options in ({}, {'vectorize': True}, {'strategy': 'forward-mode', 'vectorize': True}, {'create_graph': True}):
        close(torch.autograd.functional.jacobian(pair[0], image, **options).detach(), expected(pair[1], image))


def test_hessians(pair: tuple[nn.Module, nn.Module]) -> None:
    image = x(1, 4, 2, 2)
    reference = torch.autograd.functional.hessian(lambda x: pair[1](x).square().sum(), image)
    for way in (hessian(lambda x: pair[0](x).square().sum())(image),
                torch.autograd.functional.hessian(lambda x: pair[0](x).square().sum(), image)):
        close(way, reference)


def test_products_with_vectors(pair: tuple[nn.Module, nn.Module]) -> None:
    image, tangent = x(2, 4, 3, 2), x(2, 4, 3, 2).flip(1)
    for (value, product), (plain_value, plain_product) in (
            [jvp(module, (image,), (tangent,)) for module in pair],
            [(vjp(module, image)[0], vjp(module, image)[1](tangent)[0]) for module in pair]):
        close(value, plain_value)
        close(product, plain_product)
    tangents = jvp(pair[1], (image,), (tangent,))[1]
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(pair[0](forward_ad.make_dual(image, tangent)))
    close(dual.tangent, tangents)


def test_images_one_by_one(pair: tuple[nn.Module, nn.Module]) -> None:
    images = x(3, 4, 3, 2)
    close(vmap(lambda image: pair[0](image[None])[0])(images), pair[1](images))
    gradients = vmap(grad(lambda image: pair[0](image[None]).square().sum()))(images)
    image = images[1:2].requires_grad_()
    pair[1](image).square().sum().backward()
    close(gradients[1:2], image.grad)


def test_gradients_of_a_network_for_every_image() -> None:
    """By functional_call over the parameters, as influence functions and differential privacy take them."""
    torch.manual_seed(0)
    model = timm.create_model('preresnet20_nl_proposed_k2').eval()
    parameters, images = dict(model.named_parameters()), torch.randn(2, 3, 8, 8)

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(model, parameters, (image[None],)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    model(images).square().sum().backward()
    for name in ('layer1.nl.theta.weight', 'layer1.nl.sub_blocks.1.z.weight', 'conv1.weight'):
        torch.testing.assert_close(each[name].sum(0), parameters[name].grad, rtol=1e-3, atol=1e-4)


def test_compiled() -> None:
    """A transform inside and outside of what is compiled."""
    stage, image = NonlocalStage(4, 2).double(), x(1, 4, 3, 2)
    inside = torch.compile(lambda x: jacrev(stage)(x), backend='eager')
    for found in (inside(image), jacrev(torch.compile(stage, backend='eager'))(image)):
        close(found, expected(stage, image))
