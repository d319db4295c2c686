"""A look inside on images: the trajectory is what the model computes, and the numbers are those of its A."""

import pytest
import timm
import torch
from PIL import Image
from torch import nn

from timm_nonlocal import NonlocalBlock, NonlocalStage
from timm_nonlocal.analysis import dynamics, recorder
from timm_nonlocal.inspect import pictures


def tokens(x):
    return x.flatten(2).transpose(1, 2)


@pytest.mark.parametrize('affinity', ['embedded_gaussian', 'gaussian', 'dot_product', 'concatenation', 'uniform',
                                      'identity'])
@pytest.mark.parametrize('name', ['preresnet20_nl_proposed_k3', 'preresnet20_nl_original_k2'])
def test_trajectory_ends_where_the_model_does(name, affinity):
    model = timm.create_model(name, nl_args={'affinity': affinity}).eval()
    part = recorder.parts(model)['layer1.nl']
    x = torch.randn(2, 64, 4, 4)
    _, z = recorder.trajectory(part, tokens(x))
    assert len(z) == 1 + len(recorder.weights(part))
    torch.testing.assert_close(z[-1], tokens(part(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('control', [recorder.uniform, recorder.identity])
@pytest.mark.parametrize('kind', [NonlocalStage, NonlocalBlock])
def test_replaced_affinity_is_the_control(kind, control):
    part, same = kind(8), kind(8, affinity=control.__name__)
    same.load_state_dict({name: tensor for name, tensor in part.state_dict().items() if 'th' not in name
                          and 'phi' not in name})
    x = torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(recorder.trajectory(part, tokens(x), control)[1][-1], tokens(same(x)))


def test_parts_are_listed_once():
    model = timm.create_model('preresnet20_nl_original_k1x3')
    assert list(recorder.parts(model)) == ['layer1.nl', 'layer2.nl', 'layer3.nl']
    assert list(recorder.parts(NonlocalStage(4))) == ['']
    assert list(recorder.parts(nn.Sequential(NonlocalBlock(4), NonlocalStage(4, 2)))) == ['0', '1']


class Tiny(nn.Module):
    """A stage between two convolutions, on 6×6 positions."""

    def __init__(self, part):
        super().__init__()
        self.stem, self.nl, self.head = nn.Conv2d(3, 8, 3, padding=1), part, nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.nl(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize('symmetric', [True, False])
def test_watch(symmetric):
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

    part = found['parts']['nl']
    stage = NonlocalStage(8, 2, symmetric=symmetric, scale=1.0).double()
    stage.load_state_dict(model.nl.state_dict())
    chains = [dynamics.chain(stage.relate(tokens(model.stem(image[None])).double())[0].detach())
              for image in images[:recorder.SPECTRAL_IMAGES]]
    assert part['is_markov'] and all(chain.reversible is symmetric for chain in chains)
    assert part['mu_max'] == pytest.approx(max(chain.mu_max for chain in chains))
    assert part['markov']['row_sum_error'] < 1e-12 and part['markov']['min_entry'] > 0
    mean = sum(dynamics.markov(chain)['entropy'] for chain in chains) / len(chains)
    assert part['markov']['entropy'] == pytest.approx(mean)
    weights = recorder.weights(stage)
    assert part['kappa_stage'] == pytest.approx(
        max(dynamics.amplification(chain, weights, 'proposed') for chain in chains))
    assert len(part['kappa']) == 2 and part['kappa_stage'] <= part['kappa'][0] * part['kappa'][1] * (1 + 1e-6)
    assert part['dirichlet'][0] == part['variance'][0] == part['power'][0] == 1
    assert all(len(part[name]) == 3 for name in ('dirichlet', 'variance', 'power'))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_damping_is_seen():
    """A stage with W = I/2, C' = C, diffuses: variance and Dirichlet energy fall after every sub-block."""
    stage = NonlocalStage(8, 3, inner_dim=8, symmetric=True)
    for block in stage.sub_blocks:
        block.g.weight.data, block.z.weight.data = torch.eye(8), torch.eye(8) / 2
    part = recorder.watch(Tiny(stage).eval(), torch.randn(2, 3, 6, 6))['parts']['nl']
    for name in ('dirichlet', 'variance'):
        assert all(later < earlier for earlier, later in zip(part[name], part[name][1:], strict=False))
    assert part['kappa'] == pytest.approx([1, 1, 1]) and part['kappa_stage'] == pytest.approx(1)


def test_an_affinity_that_is_no_markov_matrix():
    found = recorder.watch(Tiny(NonlocalStage(8, 2, affinity='dot_product')).eval(), torch.randn(2, 3, 6, 6))
    part = found['parts']['nl']
    assert found['accuracy'] is None and not part['is_markov']
    assert part['markov'] is part['mu_max'] is part['kappa_stage'] is None and part['kappa'] == []
    assert len(part['variance']) == 3


def test_without_a_nonlocal_part_nothing_changes():
    found = recorder.watch(timm.create_model('preresnet20').eval(), torch.randn(2, 3, 32, 32))
    assert found['parts'] == {} and found['agreement'] == {'uniform': 100, 'identity': 100}


def test_cifar_images_are_those_of_training(small_cifar_here):
    from torchvision.datasets import CIFAR10
    images, labels = pictures.cifar(str(small_cifar_here), 10, 7)
    train, test = (CIFAR10(small_cifar_here, train=flag) for flag in (True, False))
    mean = torch.from_numpy(train.data).double().div(255).mean(0)
    expected = torch.from_numpy(test.data[:7]).double().div(255) - mean
    torch.testing.assert_close(images.double().permute(0, 2, 3, 1), expected, rtol=0, atol=1e-6)
    assert labels.tolist() == test.targets[:7]


def test_pictures_that_are_not_there(tmp_path):
    model = timm.create_model('preresnet20')
    with pytest.raises(ValueError, match='holds no picture'):
        pictures.folder(str(tmp_path), model, 3)
    (tmp_path / 'broken.png').write_bytes(b'no picture')
    with pytest.raises(ValueError, match='cannot be read as a picture'):
        pictures.folder(str(tmp_path), model, 3)
    with pytest.raises(ValueError, match='does not hold CIFAR-10 as torchvision keeps it'):
        pictures.cifar(str(tmp_path), 10, 3)
    with pytest.raises(ValueError, match='7 classes, and CIFAR 10 or 100: give --images'):
        pictures.cifar(str(tmp_path), 7, 3)


def test_a_folder_of_pictures(tmp_path):
    (tmp_path / 'below').mkdir()
    for number, path in enumerate(('b.png', 'below/a.jpg', 'notes.txt')):
        Image.new('RGB', (48, 40), (number * 80, 0, 255)).save(tmp_path / path, 'PNG')
    images, labels = pictures.folder(str(tmp_path), timm.create_model('preresnet20'), 5)
    assert images.shape == (2, 3, 32, 32) and labels is None
