"""What only a GPU shows: captured steps against eager ones, pools against learners alone, cuts, and no waiting."""

import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.training import COMMON, random_images, result, same_course, same_tensors
from timm_nonlocal.recipes import Recipe
from train import cifar
from train.engine.data import whole_plan
from train.engine.execution import Execution
from train.engine.pool import Pool
from train.engine.step import Learner, autocast, compiled_loss, count_wrong, exact_float32, logits_of, loss_of
from train.evaluate import ROUNDING, evaluate
from train.records.runs import Run

pytestmark = pytest.mark.gpu
RECIPE = Recipe(batch_size=128)
NETS = ['preresnet20', 'preresnet20_nl_proposed_k5', 'preresnet20_nl_original_k2', 'preresnet56']


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    """The same kernels every time, so that what differs is what is tested."""
    Execution(deterministic=True).prepare(torch.device('cuda'))
    yield
    Execution().prepare(torch.device('cuda'))
    gc.collect()
    torch.cuda.empty_cache()


def learners(nets: list[str], precision: str = 'no', loss: Callable[..., Any] = loss_of) -> list[Learner]:
    """On 600 images, batches of 128 and 88."""
    images, device = random_images(600, 32, 'cuda'), torch.device('cuda')
    return [Learner(Run(net, seed=seed).build().to(device).to(memory_format=torch.channels_last), RECIPE, images, seed,
                    autocast=autocast(device, precision), loss_of=loss) for seed, net in enumerate(nets)]


def one_epoch(pool: Pool, epoch: int = 0) -> list[dict[str, torch.Tensor]]:
    for member in pool.learners:
        member.seek(epoch)
    for size in (128, 128, 128, 128, 88):
        pool.step(size)
    return [{name: tensor.clone() for name, tensor in member.state().items()} for member in pool.learners]


def difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """‖a - b‖ / ‖b‖ over the weights or over their momentum, whichever is larger."""
    def of(kind: str) -> float:
        names = [f'{kind}.{name.removeprefix("momentum.")}' for name in theirs if name.startswith('momentum.')]
        pairs = [(ours[name].double(), theirs[name].double()) for name in names]
        apart = sum((a - b).square().sum().item() for a, b in pairs)
        return math.sqrt(apart / sum(b.square().sum().item() for _, b in pairs))
    return max(of('model'), of('momentum'))


def on_gpu(small_cifar_here: Path, folder: Path, *more: str) -> int:
    return cifar.main([*COMMON, '--model-kwargs', '--data-dir', str(small_cifar_here), '--output-dir', str(folder),
                 '--deterministic', *more])


@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize('net', NETS)
def test_a_captured_step_is_the_eager_step(net: str, precision: str) -> None:
    eager, = one_epoch(Pool.on(torch.device('cuda'), learners([net], precision), graph=False))
    pool = Pool.on(torch.device('cuda'), learners([net], precision))
    assert set(pool.replay) == {128, 88}
    captured, = one_epoch(pool)
    assert difference(captured, eager) < 1e-4
    start = learners([net], precision)[0].state()
    assert not torch.equal(captured['model.conv1.weight'], start['model.conv1.weight'])


@pytest.mark.parametrize('net', ['preresnet20_nl_proposed_k1', 'preresnet20_nl_proposed_k5'])
def test_a_stable_stages_captured_step_is_the_eager_step(net: str) -> None:
    """Of its weights too, which linear algebra makes: for one matrix and for several, other libraries do."""
    device, images = torch.device('cuda'), random_images(600, 32, 'cuda')
    run = Run(net, model_kwargs=("nl_args={'symmetric': True, 'stable': True}",))
    eager, captured = (Pool.on(device, [Learner(run.build().to(device), RECIPE, images)], graph)
                       for graph in (False, True))
    assert set(captured.replay) == {128, 88}
    assert difference(one_epoch(captured)[0], one_epoch(eager)[0]) < 1e-4


def test_capture_leaves_no_trace() -> None:
    members = learners(['preresnet20', 'preresnet20_nl_proposed_k5'])
    before = [{name: tensor.clone() for name, tensor in member.state().items()} for member in members]
    Pool.on(torch.device('cuda'), members)
    torch.cuda.synchronize()
    assert all(same_tensors(member.state(), state) for member, state in zip(members, before, strict=True))
    assert all(member.cursor.item() == 0 for member in members)


@pytest.mark.parametrize('precision', ['no', 'bf16'])
def test_pooled_is_alone(precision: str) -> None:
    """Five nets on five streams of one graph."""
    nets = ['preresnet20', 'preresnet20', 'preresnet20_nl_proposed_k5', 'preresnet20_nl_original_k2', 'preresnet20']
    pooled = one_epoch(Pool.on(torch.device('cuda'), learners(nets, precision)))
    for index, together in enumerate(pooled):
        alone = learners(nets, precision)[index]
        assert difference(together, one_epoch(Pool.on(torch.device('cuda'), [alone]))[0]) < 1e-5


def test_learning_rates_reach_the_captured_step() -> None:
    pool = Pool.on(torch.device('cuda'), learners(['preresnet20']))
    one_epoch(pool)
    before = pool.learners[0].state()['model.conv1.weight'].clone()
    pool.learners[0].rates.zero_()
    pool.learners[0].cursor.zero_()
    pool.step(128)
    assert torch.equal(before, pool.learners[0].state()['model.conv1.weight'])


def test_pools_one_after_the_other() -> None:
    """As in a campaign: the graphs of one are gone before those of the next are made."""
    first = one_epoch(Pool.on(torch.device('cuda'), learners(['preresnet20'] * 3)))
    for _ in range(12):  # past the 32 streams that torch hands out in turn
        gc.collect()
        torch.cuda.empty_cache()
        again = one_epoch(Pool.on(torch.device('cuda'), learners(['preresnet20'] * 3)))
    assert all(map(same_tensors, first, again))


def test_an_epoch_never_waits_for_the_device() -> None:
    """Plan, steps, learning rate and test are asked for without one synchronisation; only the sums wait."""
    pool = Pool.on(torch.device('cuda'), learners(['preresnet20', 'preresnet20_nl_proposed_k5']))
    columns = whole_plan(600).to('cuda')
    one_epoch(pool)
    torch.cuda.set_sync_debug_mode('error')
    try:
        for epoch in (1, 81):
            one_epoch(pool, epoch)
            wrong = [count_wrong(member.bare, member.images, columns) for member in pool.learners]
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert all(0 <= int(count) <= 600 for count in wrong)


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['no', 'bf16'])
@pytest.mark.parametrize('net', NETS[:2])
def test_a_compiled_and_captured_step_errs_no_more_than_the_eager_one(net: str, precision: str) -> None:
    """One step, since rounding grows from step to step, against float32 without TF32; it turns some ReLUs over."""
    def after_a_step(precision: str, graph: bool = False, loss: Any = loss_of) -> dict[str, torch.Tensor]:
        pool = Pool.on(torch.device('cuda'), learners([net], precision, loss), graph)
        pool.learners[0].seek(0)
        pool.step(128)
        return {name: tensor.clone() for name, tensor in pool.learners[0].state().items()}

    with exact_float32(torch.device('cuda')):
        exact = after_a_step('no')
        compiled = difference(after_a_step(precision, True, compiled_loss()), exact)
        assert compiled < (5e-3 if precision == 'no' else 1.3 * difference(after_a_step(precision), exact))


@pytest.mark.parametrize('more', [(), ('--seeds', '0', '1'), ('--no-graph',)], ids=['graph', 'pool', 'eager'])
def test_cut_and_resumed_gives_the_same_bits(small_cifar_here: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    folders = [tmp_path / 'whole', tmp_path / 'cut']
    assert on_gpu(small_cifar_here, folders[0], *more) == 0
    assert on_gpu(small_cifar_here, folders[1], *more, '--max-minutes', '1e-9') == 124
    assert on_gpu(small_cifar_here, folders[1], *more, '--resume', 'auto') == 0
    for seed in ('seed0', 'seed1') if 'seeds' in str(more) else ('.',):
        assert same_course(folders[0] / seed, folders[1] / seed)
        assert torch.cuda.get_device_name() == result(folders[0] / seed)['device']


def test_bf16_trains_as_float32_does(small_cifar_here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The training loss of two epochs agrees to a few per cent."""
    losses = []
    for precision in ('no', 'bf16'):
        monkeypatch.setenv('ACCELERATE_MIXED_PRECISION', precision)
        folders = [tmp_path / precision / name for name in ('preresnet20', 'preresnet20_nl_proposed_k5')]
        for folder in folders:
            assert cifar.main(['--model', folder.name, '--output-dir', str(folder), '--data-dir', str(small_cifar_here),
                               '--epochs', '2', '--batch-size', '32']) == 0
        losses.append([result(folder)['train_loss'][-1] for folder in folders])
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=0.1)


def test_the_cpu_counts_the_same_images() -> None:
    """The error of a network, to the last image."""
    model, images = learners(['preresnet20_nl_proposed_k5'])[0].bare, random_images(600, 32)
    ours = evaluate(model, images.to('cuda'))
    logits = [logits_of(model.to(device), images.to(device), whole_plan(600).to(device)).cpu()
              for device in ('cuda', 'cpu')]
    sizes = logits[1].abs().amax(dim=1, keepdim=True)
    assert ((logits[0] - logits[1]).abs() / sizes).max() < ROUNDING / 3, 'float32 without TF32'
    assert abs(ours['wrong'] - evaluate(model.cpu(), images)['wrong']) <= ours['ties']
