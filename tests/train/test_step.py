"""One training step against plain PyTorch; pools, captured steps and processes against learners alone."""

import json
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

import timm_nonlocal  # noqa: F401
from tests.support.process import ROOT, run
from tests.support.training import random_images, same_tensors
from timm_nonlocal.recipes import FINE_TUNING, PAPER, SHORT, Recipe, nearest, recipe_id
from train.engine.data import Images, batch, epoch_plan
from train.engine.pool import WARM_UP, CudaGraphs, Pool
from train.engine.step import Learner, autocast, compiled_loss, loss_of
from train.records.runs import Run, surroundings

pytestmark = pytest.mark.usefixtures('one_thread')
RECIPE = Recipe(epochs=3, batch_size=16, milestones=(1,))
MODEL = 'preresnet20_nl_proposed_k2'


def learner(seed: int = 0, images: Images | None = None, model: str = MODEL, **options: Any) -> Learner:
    network = Run(model, seed=seed).build().to(memory_format=torch.channels_last)
    return Learner(network, RECIPE, images or random_images(), seed, **options)


def epochs(pool: Pool, count: int = 2) -> list[dict[str, torch.Tensor]]:
    """The states after whole epochs of 16, 16 and 8 images."""
    for epoch in range(count):
        for member in pool.learners:
            member.seek(epoch)
        for size in (16, 16, 8):
            pool.step(size)
    return [{name: tensor.clone() for name, tensor in member.state().items()} for member in pool.learners]


def test_recipe_is_the_papers() -> None:
    recipe = Recipe()
    steps = recipe.epochs * -(-50_000 // recipe.batch_size)
    assert (recipe.epochs, recipe.batch_size, steps) == (164, 128, 64_124)
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 1e-4)
    rates = [recipe.lr_at(epoch * 391, 391) for epoch in (0, 80, 81, 121, 122, 163)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert recipe_id(recipe) == "paper" and recipe_id(Recipe(lr=0.01)) == "paper lr=0.01"


def test_steps_equal_plain_pytorch() -> None:
    """Against the mean loss, an optimizer with a number for the learning rate and no tensor kept between steps."""
    images, ours = random_images(), learner()
    model = Run(MODEL, seed=0).build()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4, foreach=False)
    for epoch in range(2):
        plain.param_groups[0]['lr'] = RECIPE.lr_at(epoch * 3, 3)
        plan, seen, losses, wrong = epoch_plan(40, 0, epoch), 0, 0.0, 0
        ours.seek(epoch)
        for size in (16, 16, 8):
            x, y = batch(images, plan[:, seen:seen + size])
            logits = model(x)
            loss = F.cross_entropy(logits, y)
            plain.zero_grad()
            loss.backward()
            plain.step()
            ours.step(size)
            seen, losses, wrong = seen + size, losses + size * loss.item(), wrong + (logits.argmax(1) != y).sum().item()
        assert ours.loss.item() == pytest.approx(losses, rel=1e-4) and ours.wrong.item() == wrong
        assert ours.cursor.item() == 40
    for name, value in model.state_dict().items():
        torch.testing.assert_close(ours.bare.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_weight_decay_reaches_every_parameter() -> None:
    model = timm.create_model('preresnet20')
    ours = Learner(model, Recipe(lr=0.5, weight_decay=0.01, momentum=0.0), random_images())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    ours.optimizer.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, before[name] * (1 - 0.5 * 0.01), msg=name)


def test_what_a_step_uses_keeps_its_address() -> None:
    """Also over epochs, learning rates and a state that is loaded: a captured step would see all of it."""
    ours = learner()

    def addresses() -> list[int]:
        rate = ours.optimizer.param_groups[0]['lr']
        return [tensor.data_ptr() for tensor in (*ours.state().values(), ours.plan, ours.cursor, ours.offsets, rate)]

    before, state = addresses(), {name: tensor.clone() for name, tensor in ours.state().items()}
    epochs(Pool([ours]))
    rate = ours.optimizer.param_groups[0]['lr']
    assert rate.item() == pytest.approx(RECIPE.lr_at(3, 3)) and not same_tensors(ours.state(), state)
    ours.load_state(state)
    assert addresses() == before and same_tensors(ours.state(), state)


def test_a_state_of_another_network_is_refused() -> None:
    other = learner(model='preresnet20')
    with pytest.raises(ValueError, match='of its tensors do not fit the network, such as mo'):
        learner().load_state(other.state())


def test_pooled_equals_alone_bit_for_bit() -> None:
    """Also networks of several architectures side by side."""
    members = ((0, MODEL), (1, MODEL), (2, 'preresnet20'))
    alone = [epochs(Pool([learner(seed, model=model)]))[0] for seed, model in members]
    pooled = epochs(Pool([learner(seed, model=model) for seed, model in members]))
    assert all(map(same_tensors, pooled, alone))
    assert not torch.equal(pooled[0]['model.conv1.weight'], pooled[1]['model.conv1.weight'])


class Recorder(CudaGraphs):
    """Takes the place of CUDA graphs: what it captures runs at once (which a capture would not) and at every replay."""

    def __init__(self) -> None:
        self.captured, self.warm_ups, self.inside = 0, 0, False

    def side_by_side(self, functions: list[Callable[[], None]]) -> None:
        assert self.inside or self.captured
        self.warm_ups += self.inside
        for function in reversed(functions):  # side by side is in no order
            function()

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        assert not self.inside
        self.captured += 1
        function()
        return function


def test_capture_leaves_no_trace_and_replays_the_steps() -> None:
    """Warm-up and capture change weights, statistics, momentum and meters, and put all of it back, mid-epoch too."""
    learners, graphs = [learner(0), learner(1)], Recorder()
    for member in learners:
        member.seek(0)
        member.step(16)
    before = [{**member.state(), 'cursor': member.cursor} for member in learners]
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in before]
    pool = Pool(learners, graphs)
    for member, state in zip(learners, before, strict=True):
        assert same_tensors({**member.state(), 'cursor': member.cursor}, state)
    assert pool.sizes == [16, 8] and graphs.captured == 2 and graphs.warm_ups == 2 * WARM_UP
    assert set(pool.replay) == {16, 8}
    eager = Pool([learner(0), learner(1)])
    captured = Pool([learner(0), learner(1)], Recorder())
    assert all(map(same_tensors, epochs(captured), epochs(eager)))


def test_a_step_that_waits_is_not_captured() -> None:
    """Nor is the batch size before it, and the pool goes on from where the learner was."""
    class Waiting(Recorder):
        def capture(self, function: Callable[[], None]) -> Callable[[], None]:
            if self.captured:
                raise RuntimeError('operation not permitted when stream is capturing\nCompile with …')
            return super().capture(function)

    with pytest.warns(UserWarning, match='in no CUDA graph: operation not permitted when stream is capturing$'):
        pool = Pool([learner()], Waiting())
    assert not pool.replay and same_tensors(epochs(pool)[0], epochs(Pool([learner()]))[0])


@pytest.mark.parametrize(('count', 'sizes'), [(40, [16, 8]), (32, [16]), (10, [10])])
def test_sizes_of_an_epochs_batches(count: int, sizes: list[int]) -> None:
    assert Pool([learner(images=random_images(count))]).sizes == sizes


def test_a_pool_needs_one_step_for_all() -> None:
    with pytest.raises(ValueError, match='same number of images and the same batch size'):
        Pool([learner(), learner(images=random_images(41))])


def test_bf16_keeps_float32_weights() -> None:
    ours = learner(autocast=autocast(torch.device('cpu'), 'bf16'))
    plain = learner()
    for member in (ours, plain):
        member.seek(0)
        member.step(16)
    assert all(tensor.dtype != torch.bfloat16 for tensor in ours.state().values())
    assert ours.loss.item() == pytest.approx(plain.loss.item(), rel=0.02) and ours.loss.item() != plain.loss.item()


def test_the_loss_compiles_whole() -> None:
    """No break in the graph, and one compilation for a batch size, shared by the seeds."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend('eager')
    compiled = torch.compile(loss_of, backend=counter, dynamic=False, fullgraph=True)
    networks = [learner(seed, model='preresnet20', loss_of=compiled) for seed in (0, 1)]
    for network in networks:
        network.seek(0)
        network.step(16)
        network.step(8)
    assert counter.frame_count == 2
    eager = learner(1, model='preresnet20')
    eager.seek(0)
    eager.step(16)
    eager.step(8)
    torch.testing.assert_close(networks[1].loss, eager.loss, rtol=1e-4, atol=0)


def test_two_processes_share_a_plan_and_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PYTHONPATH', '')
    result = run('-m', 'torch.distributed.run', '--nproc_per_node', '2', '--rdzv_backend', 'c10d', '--rdzv_endpoint',
                 'localhost:0', str(ROOT / 'tests' / 'train' / 'ddp_gradients.py'))
    assert result.returncode == 0, result.stderr
    lines = [line.split() for line in result.stdout.splitlines() if not line.startswith('[Gloo]')]  # torch 2.9
    assert len(lines) == 4, result.stdout  # two processes, two cases
    for error, loss, same_plan in lines:
        assert float(error) < 1e-12 and float(loss) < 1e-6 and same_plan == 'True', lines


def test_the_commit_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv('PATH', str(tmp_path))
    monkeypatch.setenv('GIT_COMMIT', 'abc')
    assert surroundings(torch.device('cpu'))['commit'] == 'abc'


@pytest.mark.slow
def test_the_compiled_step_is_the_eager_step() -> None:
    """By the compiler itself: the first loss and its gradients, for two seeds."""
    loss = compiled_loss()
    for seed in (0, 1):
        ours, eager = learner(seed, loss_of=loss), learner(seed)
        for network in (ours, eager):
            network.seek(0)
            network.step(16)
        torch.testing.assert_close(ours.loss, eager.loss, rtol=1e-5, atol=0)
        for name, p in ours.parameters.items():
            torch.testing.assert_close(p.grad, eager.parameters[name].grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='another C library than glibc')
def test_freed_memory_is_used_again() -> None:
    program = ('import resource, torch\n'
               'from train.engine.execution import Execution\n'
               'Execution().prepare(torch.device("cpu"))\n'
               'for _ in range(20):\n'
               '    torch.ones(8 << 20)\n'  # 32 MiB, 8192 pages
               'print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)\n')
    without = program.replace('Execution().prepare', '(lambda _: 0)')
    kept, fresh = (int(run('-c', text).stdout) for text in (program, without))
    assert kept < fresh - 10 * 8192


def test_fine_tuning_rises_and_falls_linearly() -> None:
    """The highest rate is reached after the warm-up, the last step has the smallest one above zero."""
    recipe, steps = FINE_TUNING, FINE_TUNING.epochs * 40
    rates = [recipe.lr_at(step, 40) for step in range(steps)]
    top = rates.index(max(rates))
    assert (top, rates[top]) == (0.05 * steps, pytest.approx(0.05))
    assert sorted(set(rates[:top + 1])) == rates[:top + 1]
    falls = [a - b for a, b in zip(rates[top:-1], rates[top + 1:], strict=True)]
    assert falls == pytest.approx([rates[-1]] * len(falls)) and rates[-1] == pytest.approx(0.05 / (0.95 * steps))


@pytest.mark.parametrize('recipe', [PAPER, SHORT, FINE_TUNING, Recipe(lr=0.3, milestones=()),
                                    Recipe(epochs=20, milestones=(), nesterov=True, anneal='linear', mean='colour')])
def test_recipes_survive_json(recipe: Recipe) -> None:
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


def test_what_older_lines_lack_is_the_papers() -> None:
    old = {'epochs': 164, 'batch_size': 128, 'lr': 0.01, 'milestones': [81, 122], 'gamma': 0.1, 'momentum': 0.9,
           'weight_decay': 1e-4}
    assert Recipe.from_dict(old) == Recipe(lr=0.01) and recipe_id(Recipe.from_dict(old)) == 'paper lr=0.01'
    assert nearest(Recipe(epochs=10, lr=0.05, weight_decay=5e-4, nesterov=True, anneal='linear')) == 'ft'
