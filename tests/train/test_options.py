"""The options of the training commands: what a tag says, and numbers that are off, each one line and exit code 2."""

from collections.abc import Callable

import pytest

from timm_nonlocal.recipes import FINE_TUNING, PAPER, SHORT
from train import campaign, cifar, evaluate


@pytest.mark.parametrize(('words', 'dataset', 'recipe', 'folder'), [
    ('preresnet56.cifar100', 'cifar100', PAPER, 'preresnet56.cifar100.seed0'),
    ('preresnet56.cifar100 --recipe short --dataset cifar100', 'cifar100', SHORT, 'preresnet56.cifar100.seed0'),
    ('preresnet20_nl_proposed_k5.ft_cifar10', 'cifar10', FINE_TUNING, 'preresnet20_nl_proposed_k5.cifar10.seed0'),
    ('preresnet56.ft_cifar100 --recipe ft', 'cifar100', FINE_TUNING, 'preresnet56.cifar100.seed0'),
    ('preresnet56', 'cifar10', PAPER, 'preresnet56.cifar10.seed0'),
    ('preresnet56 --dataset cifar100 --recipe ft', 'cifar100', FINE_TUNING, 'preresnet56.cifar100.seed0'),
])
def test_a_tag_says_the_data_set(words: str, dataset: str, recipe: object, folder: str) -> None:
    args = cifar.parse(['--model', *words.split()])
    assert (args.dataset, args.recipe, cifar.output_dir(args).name) == (dataset, recipe, folder)


def refused(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int], words: str) -> str:
    with pytest.raises(SystemExit) as end:
        main(words.split())
    line, = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    return line


@pytest.mark.parametrize(('words', 'message'), [
    ('preresnet56.cifar100 --dataset cifar10', 'the tag says cifar100; leave out one'),
    ('preresnet20.ft_cifar10 --dataset cifar100', 'the tag says cifar10; leave out one'),
    ('preresnet20.ft_cifar10 --recipe paper', 'the tag says ft; leave out one'),
    ('preresnet20.in1k', 'the tag in1k says no data set; use cifar10, cifar100, ft_cifar10, ft_cifar100, or '
                         'preresnet20 with --dataset'),
    ('resnet18.a1_in1k', 'or resnet18 with --dataset'),
])
def test_a_tag_is_contradicted_loudly(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert message in refused(capsys, cifar.main, f'--model {words}')


@pytest.mark.parametrize(('words', 'message'), [
    *((f'--lr={lr}', f'--lr: {lr} is not a finite number above 0') for lr in ('nan', 'inf', '-0.1', '0', 'x')),
    *((f'--{name}={bad}', f'--{name}: {bad} is not a finite number of at least 0')
      for name in ('gamma', 'momentum', 'weight-decay', 'warmup', 'save-seconds', 'max-minutes')
      for bad in ('nan', 'inf', '-1')),
    ('--warmup 1.5', '--warmup: 1.5 is not a finite number of at least 0 and at most 1'),
    *((f'--{name} {bad}', f'{bad} is not a whole number of at least {least}')
      for names, least, bads in (('epochs batch-size test-every spectrum-epochs', 1, '0 -3 1.5'),
                                 ('threads limit milestones', 0, '-1 -5 nan'))
      for name in names.split() for bad in bads.split()),
])
def test_numbers_that_are_off(capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert message in refused(capsys, cifar.main, words)


def test_other_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, evaluate.main, 'preresnet20 --limit -5').endswith('-5 is not a whole number of at least 0')
    assert '--jobs: 0 is not' in refused(capsys, campaign.main, '--output-dir x --jobs 0')


@pytest.mark.parametrize('main', [cifar.main, evaluate.main, campaign.main])
def test_help_ends_with_the_exit_codes(capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int]) -> None:
    with pytest.raises(SystemExit):
        main(['--help'])
    assert 'Exit codes: 0 ' in capsys.readouterr().out.partition('options:')[2]
