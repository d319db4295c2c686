"""Weights by every way they can come: in the package, from the Hub's cache, from files; and none at all.

None are trained yet, so a copy of the package gets random ones, and a process of its own tells what it makes of them.
"""

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.support.networks import calibrated, package_with_weights
from tests.support.process import run
from timm_nonlocal.models import pretrained


def run_in(folder: Path, code: str, **env: str) -> None:
    """Runs code in a process that imports the package from folder."""
    result = run('-W', 'ignore', '-c', textwrap.dedent(code), cwd=folder, env=env)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope='module')
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two networks with weights: one with its default tag and a line in the index, one with its other tag alone."""
    folder = tmp_path_factory.mktemp('weighted')
    package_with_weights(folder, 'preresnet20_nl_proposed_k2.cifar10', 'preresnet20.cifar100', index={
        'preresnet20_nl_proposed_k2.cifar10': {
            'num_params': 231_770, 'macs': 145_000_000, 'test_error': 8.96, 'recipe': 'train it'}})
    return folder


HEAD = '''
    import pytest, timm, torch, timm_nonlocal
    from safetensors.torch import load_file
    from pathlib import Path
    weights = Path(timm_nonlocal.__file__).parent / 'weights'
    assert weights.is_dir()
    def state(name):
        return load_file(weights / f'{name}.safetensors')
    def same(a, b):
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    K2 = 'preresnet20_nl_proposed_k2.cifar10'
'''


def test_timm_loads_what_is_in_the_package(weighted: Path) -> None:
    run_in(weighted, HEAD + '''
    assert timm.list_pretrained('preresnet*') == ['preresnet20.cifar100', K2]
    for name in timm.list_pretrained('preresnet*'):
        assert same(timm.create_model(name, pretrained=True).state_dict(), state(name))
    architecture = K2.split('.')[0]
    assert same(timm.create_model(architecture, pretrained=True).state_dict(), state(K2))
    assert timm.is_model_pretrained(architecture) and not timm.is_model_pretrained('preresnet20')

    other = timm.create_model(K2, pretrained=True, num_classes=5, in_chans=1)
    own = state(K2)
    torch.testing.assert_close(other.conv1.weight, own['conv1.weight'].sum(1, keepdim=True))
    assert other.fc.out_features == 5
    assert all(torch.equal(w, own[key]) for key, w in other.state_dict().items()
               if key not in ('conv1.weight', 'fc.weight', 'fc.bias'))
    assert timm.create_model(K2, pretrained=True, num_classes=0)(torch.randn(1, 3, 32, 32)).shape == (1, 256)
    features = timm.create_model(K2, pretrained=True, features_only=True)
    assert torch.equal(features.layer1.nl.theta.weight, own['layer1.nl.theta.weight'])
    ''')


def test_the_default_tag_stays_the_papers(weighted: Path) -> None:
    """Also where the other one alone has weights; and what has none says so in one line that names what there is."""
    run_in(weighted, HEAD + '''
    model = timm.create_model('preresnet20')
    assert model.num_classes == 10 and model.pretrained_cfg['tag'] == 'cifar10'
    for name in ('preresnet20', 'preresnet20.cifar10'):
        with pytest.raises(RuntimeError, match='^preresnet20.cifar10 has no pretrained weights; tags that have some: '
                           'preresnet20.cifar100, preresnet20_nl_proposed_k2.cifar10$'):
            timm.create_model(name, pretrained=True)
    ''')


def test_torchvision_loads_the_same(weighted: Path) -> None:
    run_in(weighted, HEAD + '''
    import copy, pickle, numpy
    from PIL import Image
    from torchvision.models import get_model, get_model_weights, get_weight
    enum = get_model_weights('preresnet20_nl_proposed_k2')
    assert [member.name for member in enum] == ['CIFAR10'] and enum.DEFAULT is enum.CIFAR10
    weight = get_weight('PreResNet20_NL_Proposed_K2_Weights.CIFAR10')
    assert weight is enum.CIFAR10 is get_weight('PreResNet20_NL_Proposed_K2_Weights.DEFAULT')
    assert pickle.loads(pickle.dumps(weight)) is weight and copy.deepcopy(weight) is weight
    architecture = K2.split('.')[0]
    for given in (weight, 'CIFAR10', 'DEFAULT', 'PreResNet20_NL_Proposed_K2_Weights.CIFAR10'):
        assert same(get_model(architecture, weights=given).state_dict(), state(K2))
    assert same(weight.get_state_dict(progress=False, check_hash=True), state(K2))
    assert weight.url == (weights / f'{K2}.safetensors').as_uri()
    meta = weight.meta
    assert len(meta['categories']) == 10 and meta['categories'][3] == 'cat' and meta['min_size'] == (4, 4)
    assert meta['num_params'] == sum(p.numel() for p in get_model(architecture, weights=weight).parameters())
    assert meta['_metrics'] == {'CIFAR-10': {'acc@1': 91.04}} and meta['recipe'] == 'train it'
    image = Image.fromarray(numpy.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype('uint8'))
    expected = timm.data.create_transform(**timm.data.resolve_data_config(model=timm.create_model(K2)))(image)
    torch.testing.assert_close(weight.transforms()(image), expected)
    with pytest.raises(ValueError, match='num_classes=5 does not fit .*K2_Weights.CIFAR10, which has 10'):
        get_model(architecture, weights='DEFAULT', num_classes=5)

    other = get_model_weights('preresnet20')
    assert [member.name for member in other] == ['CIFAR100'] and 'DEFAULT' not in other.__members__
    assert get_model('preresnet20', weights='CIFAR100').num_classes == 100
    with pytest.raises(ValueError, match="^PreResNet20_Weights has no 'DEFAULT'; it has CIFAR100$"):
        get_model('preresnet20', weights='DEFAULT')
    ''')


def cached(cache: Path, repo: str, files: dict) -> None:
    """Puts files into a folder as if huggingface_hub had downloaded them."""
    folder = cache / f'models--{repo.replace("/", "--")}'
    (folder / 'refs').mkdir(parents=True)
    (folder / 'refs' / 'main').write_text('0' * 40)
    (folder / 'snapshots' / ('0' * 40)).mkdir(parents=True)
    for name, source in files.items():
        shutil.copy(source, folder / 'snapshots' / ('0' * 40) / name)


def test_the_hub_where_the_package_has_no_file(tmp_path: Path) -> None:
    """An id in the index is enough for pretrained=True and torchvision; hf-hub: reads config.json as well."""
    name, repo = 'preresnet20_nl_proposed_k2.cifar10', 'someone/preresnet20_nl_proposed_k2.cifar10'
    package_with_weights(tmp_path, index={name: {'hf_hub_id': repo}})
    args: dict[str, Any] = {'nl_args': {'symmetric': True}}
    timm.models.save_for_hf(calibrated(name, **args), str(tmp_path / 'saved'), model_args=args, safe_serialization=True)
    cached(tmp_path / 'hub', 'someone/symmetric', {
        file: tmp_path / 'saved' / file for file in ('model.safetensors', 'config.json')})
    save_file(calibrated(name).state_dict(), tmp_path / 'model.safetensors')
    cached(tmp_path / 'hub', repo, {'model.safetensors': tmp_path / 'model.safetensors'})
    run_in(tmp_path, HEAD + f'''
    own = load_file('model.safetensors')
    assert timm.list_pretrained('preresnet*') == [K2]
    assert same(timm.create_model(K2, pretrained=True).state_dict(), own)
    from torchvision.models import get_model, get_weight
    assert same(get_model(K2.split('.')[0], weights='DEFAULT').state_dict(), own)
    assert '{repo}' in get_weight('PreResNet20_NL_Proposed_K2_Weights.CIFAR10').url

    hub = timm.create_model('hf-hub:someone/symmetric', pretrained=True)
    assert same(hub.state_dict(), load_file('saved/model.safetensors')) and hub.layer1.nl.phi is None
    assert timm.create_model('hf-hub:someone/symmetric', pretrained=True, num_classes=3, in_chans=1).num_classes == 3
    ''', HF_HUB_CACHE=str(tmp_path / 'hub'), HF_HUB_OFFLINE='1')


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    """A network, and its folder as timm writes it for the Hub."""
    model = calibrated('preresnet20_nl_proposed_k2')
    timm.models.save_for_hf(model, str(tmp_path), safe_serialization=True)
    return model, tmp_path


@pytest.mark.parametrize('way', ['file', 'state_dict', 'checkpoint_path', 'local-dir'])
def test_weights_of_ones_own(saved: tuple[Any, Path], way: str) -> None:
    """The same logits; and for other classes and channels the same features."""
    model, folder = saved
    file = folder / 'model.safetensors'

    def create(**kwargs: Any) -> Any:
        if way == 'local-dir':
            return timm.create_model(f'local-dir:{folder}', pretrained=True, **kwargs).eval()
        if way == 'checkpoint_path':
            return timm.create_model('preresnet20_nl_proposed_k2', checkpoint_path=str(file), **kwargs).eval()
        overlay = {'file': str(file)} if way == 'file' else {'state_dict': model.state_dict()}
        return timm.create_model(
            'preresnet20_nl_proposed_k2', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()

    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(create()(x), model(x))
        if way == 'checkpoint_path':  # timm loads a checkpoint as it is, into a network of its own shape
            with pytest.raises(RuntimeError, match='size mismatch for fc.weight'):
                create(num_classes=5)
            other: Any = calibrated('preresnet20_nl_proposed_k2', (4, 1, 32, 32), num_classes=5, in_chans=1)
            save_file(other.state_dict(), file)
            assert torch.equal(create(num_classes=5, in_chans=1)(x[:, :1]), other(x[:, :1]))
            return
        assert torch.equal(create(num_classes=0)(x), model.forward_head(model.forward_features(x), pre_logits=True))
        other, grey = create(num_classes=5, in_chans=1), x[:, :1]
        assert other(grey).shape == (2, 5)
        torch.testing.assert_close(
            other.forward_features(grey), model.forward_features(grey.expand_as(x)), rtol=1e-3, atol=1e-4)
    assert timm.create_model('preresnet20_nl_proposed_k2', pretrained_cfg='cifar100').num_classes == 100


def test_the_config_names_the_classes(saved: tuple[Any, Path]) -> None:
    config = json.loads((saved[1] / 'config.json').read_text())
    assert config['architecture'] == 'preresnet20_nl_proposed_k2'
    assert config['pretrained_cfg']['label_names'][:2] == ['airplane', 'automobile']


def test_unknown_tag() -> None:
    with pytest.raises(RuntimeError, match=r'^Invalid pretrained tag \(svhn\) for preresnet20\.$'):
        timm.create_model('preresnet20.svhn', pretrained=True)


@pytest.mark.parametrize(('files', 'default'), [
    ([], 'cifar10'), (['ft_cifar10'], 'ft_cifar10'), (['ft_cifar10', 'cifar10'], 'cifar10'),
    (['ft_cifar100', 'cifar100'], 'cifar10'), (['ft_cifar100', 'ft_cifar10'], 'ft_cifar10')])
def test_without_a_tag_the_papers_recipe_then_fine_tuning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
                                                          files: list[str], default: str) -> None:
    """Of the data set that the name stands for, whatever else has weights."""
    for tag in files:
        (tmp_path / f'net.{tag}.safetensors').write_bytes(b'')
    monkeypatch.setattr(pretrained, 'WEIGHTS', tmp_path)
    made = pretrained.default_cfgs({'net': 'cifar10'})['net']
    assert made.tags[0] == default and set(made.cfgs) == {'cifar10', 'cifar100', 'ft_cifar10', 'ft_cifar100'}
