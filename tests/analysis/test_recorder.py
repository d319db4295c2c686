"""A look inside on images: the trajectory is what the model computes, and the numbers are those of its A."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from timm_nonlocal import NonlocalBlock, NonlocalStage
from timm_nonlocal.analysis import dynamics, recorder


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize('affinity', ['embedded_gaussian', 'gaussian', 'dot_product', 'concatenation', 'uniform',
                                      'identity'])
@pytest.mark.parametrize('name', ['preresnet20_nl_proposed_k3', 'preresnet20_nl_original_k2'])
def test_trajectory_ends_where_the_model_does(name: str, affinity: str) -> None:
    model = timm.create_model(name, nl_args={'affinity': affinity}).eval()
    module = recorder.nonlocal_modules(model)['layer1.nl']
    x = torch.randn(2, 64, 4, 4)
    _, z = recorder.trajectory(module, tokens(x))
    assert len(z) == 1 + len(recorder.block_weights(module))
    torch.testing.assert_close(z[-1], tokens(module(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('control', [recorder.uniform, recorder.identity])
@pytest.mark.parametrize('kind', [NonlocalStage, NonlocalBlock])
def test_replaced_affinity_is_the_control(kind: type[NonlocalBlock] | type[NonlocalStage],
                                          control: Callable[..., Any]) -> None:
    module, same = kind(8), kind(8, affinity=control.__name__)
    same.load_state_dict({name: tensor for name, tensor in module.state_dict().items() if 'th' not in name
                          and 'phi' not in name})
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(recorder.trajectory(module, tokens(x), control)[1][-1], tokens(same(x)))


def test_modules_are_listed_once() -> None:
    model = timm.create_model('preresnet20_nl_original_k1x3')
    assert list(recorder.nonlocal_modules(model)) == ['layer1.nl', 'layer2.nl', 'layer3.nl']
    assert list(recorder.nonlocal_modules(NonlocalStage(4))) == ['']
    assert list(recorder.nonlocal_modules(nn.Sequential(NonlocalBlock(4), NonlocalStage(4, 2)))) == ['0', '1']


class Tiny(nn.Module):
    """A stage between two convolutions, on 6×6 positions."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.stem, self.nl, self.head = nn.Conv2d(3, 8, 3, padding=1), module, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.nl(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize('symmetric', [True, False])
def test_watch(symmetric: bool) -> None:
    model = Tiny(NonlocalStage(8, 2, symmetric=symmetric, scale=1.0)).eval()
    images, labels = torch.randn(6, 3, 6, 6), torch.randint(0, 4, (6,))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = []
    found = recorder.watch(model, images, labels, lambda done, total: seen.append((done, total)))
    assert seen == [(n, 6) for n in range(6)]
    assert (found['images'], found['spectral_images']) == (6, recorder.SPECTRAL_IMAGES)
    learned = model(images).argmax(1)
    assert found['accuracy']['learned'] == pytest.approx(100 * (learned == labels).float().mean().item(), abs=1e-4)
    assert set(found['agreement']) == {'uniform', 'identity'}

    module = found['modules']['nl']
    stage = NonlocalStage(8, 2, symmetric=symmetric, scale=1.0).double()
    stage.load_state_dict(model.nl.state_dict())
    chains = [dynamics.markov_chain(stage.relate(tokens(model.stem(image[None])).double())[0].detach())
              for image in images[:recorder.SPECTRAL_IMAGES]]
    assert module['is_markov'] and all(chain.reversible is symmetric for chain in chains)
    assert module['mu_max'] == pytest.approx(max(chain.mu_max for chain in chains))
    assert module['markov']['row_sum_error'] < 1e-12 and module['markov']['min_entry'] > 0
    mean = sum(dynamics.markov(chain)['entropy'] for chain in chains) / len(chains)
    assert module['markov']['entropy'] == pytest.approx(mean)
    weights = recorder.block_weights(stage)
    assert module['kappa_stage'] == pytest.approx(
        max(dynamics.amplification(chain, weights, 'proposed') for chain in chains))
    assert len(module['kappa']) == 2 and module['kappa_stage'] <= module['kappa'][0] * module['kappa'][1] * (1 + 1e-6)
    assert module['dirichlet'][0] == module['variance'][0] == module['power'][0] == 1
    assert all(len(module[name]) == 3 for name in ('dirichlet', 'variance', 'power'))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_damping_is_seen() -> None:
    """A stage with W = I/2, C' = C, diffuses: variance and Dirichlet energy fall after every sub-block."""
    stage = NonlocalStage(8, 3, inner_dim=8, symmetric=True)
    for block in stage.sub_blocks:
        block.g.weight.data, block.z.weight.data = torch.eye(8), torch.eye(8) / 2
    module = recorder.watch(Tiny(stage).eval(), torch.randn(2, 3, 6, 6))['modules']['nl']
    for name in ('dirichlet', 'variance'):
        assert all(later < earlier for earlier, later in zip(module[name], module[name][1:], strict=False))
    assert module['kappa'] == pytest.approx([1, 1, 1]) and module['kappa_stage'] == pytest.approx(1)


def test_an_affinity_that_is_no_markov_matrix() -> None:
    found = recorder.watch(Tiny(NonlocalStage(8, 2, affinity='dot_product')).eval(), torch.randn(2, 3, 6, 6))
    module = found['modules']['nl']
    assert found['accuracy'] is None and not module['is_markov']
    assert module['markov'] is module['mu_max'] is module['kappa_stage'] is None and module['kappa'] == []
    assert len(module['variance']) == 3


def test_without_a_nonlocal_module_nothing_changes() -> None:
    found = recorder.watch(timm.create_model('preresnet20').eval(), torch.randn(2, 3, 32, 32))
    assert found['modules'] == {} and found['agreement'] == {'uniform': 100, 'identity': 100}


def test_what_a_layer_computes_counts_and_not_the_weight_inside_it() -> None:
    """As with adapters: the layer that holds the weight is called through another."""
    class Adapted(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer, self.weight = layer, layer.weight
            self.in_features = layer.in_features

        def forward(self, x: Tensor) -> Tensor:
            return 3 * self.layer(x)

    stage, x = NonlocalStage(4, 2), torch.randn(1, 9, 4)
    weights = recorder.block_weights(stage)
    block: Any = stage.sub_blocks[0]
    block.z = Adapted(block.z)
    found = recorder.block_weights(stage)
    torch.testing.assert_close(found[0][0], 3 * weights[0][0])
    assert all(torch.equal(a, b) for a, b in zip((found[0][1], *found[1]), (weights[0][1], *weights[1]), strict=True))
    torch.testing.assert_close(recorder.trajectory(stage, x)[1][-1], stage(x.mT.unflatten(2, (3, 3))).flatten(2).mT)
    block.z = nn.Identity()
    with pytest.raises(ValueError, match=r'^z \(Identity\) has no weight'):
        recorder.block_weights(stage)


def test_one_position_and_a_module_that_does_not_run() -> None:
    """A of one position has no second eigenvalue; who did not run shows nothing."""
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.runs, self.rests = NonlocalStage(4, 2), NonlocalStage(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.runs(x).mean((2, 3))

    found = recorder.watch(Net().eval(), torch.randn(2, 4, 1, 1))['modules']
    assert found.keys() == {'runs'}
    assert found['runs']['is_markov'] and found['runs']['markov'] is None and found['runs']['kappa'] == []
    assert found['runs']['power'] == pytest.approx([1, 1, 1])


@pytest.mark.gpu
@pytest.mark.parametrize('symmetric', [False, True])
def test_on_a_gpu_as_on_the_cpu(symmetric: bool) -> None:
    model = nn.Sequential(NonlocalStage(4, 2, symmetric=symmetric), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = torch.randn(3, 4, 5, 5)
    expected, rows = recorder.watch(model, images), recorder.rows(model, images, [(0.5, 0.5)])['0'][0]
    model, images = model.cuda(), images.cuda()
    assert recorder.watch(model, images)['modules']['0']['kappa'] == pytest.approx(expected['modules']['0']['kappa'])
    torch.testing.assert_close(recorder.rows(model, images, [(0.5, 0.5)])['0'][0], rows)
