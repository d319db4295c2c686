"""One training step on tensors that stay where they are."""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_nonlocal.recipes import Recipe
from train.engine.data import Images, batch, epoch_plan

__all__ = ['Learner', 'autocast', 'compiled_loss', 'count_wrong', 'exact_float32', 'logits_of', 'loss_of']


def autocast(device: torch.device, mixed_precision: str) -> Callable[[], AbstractContextManager]:
    """Makes the context that forward and loss run in: bfloat16 where mixed_precision is 'bf16', float32 where 'no'."""
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=mixed_precision == 'bf16')


def loss_of(model: nn.Module, images: Images, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Crop, flip, forward and loss: the part of a step that `torch.compile` takes.

    Args:
        columns: int32 (4, b), columns of a plan.

    Returns:
        The cross-entropy summed over the b images, and how many are wrong: float32 () and int64 ().
    """
    x, y = batch(images, columns)
    logits = model(x)
    return F.cross_entropy(logits, y, reduction='sum'), (logits.detach().argmax(dim=1) != y).sum()


def compiled_loss() -> Callable[[nn.Module, Images, Tensor], tuple[Tensor, Tensor]]:
    """`loss_of` by `torch.compile`: one compilation for each architecture and batch size, shared by all seeds."""
    torch._dynamo.reset()  # forget earlier networks
    torch._dynamo.config.recompile_limit = 64  # architectures times batch sizes; past it torch falls back to eager
    return torch.compile(loss_of, dynamic=False)


class Learner:
    """One network with its optimizer, its epoch plan and its meters.

    Everything a step reads or writes is a tensor that keeps its address, the learning rate and the position in the
    plan included, so that a step takes no argument but its size and can be captured once and replayed.

    Args:
        model: the network on its device, wrapped for data parallelism where processes share it.
        recipe: batch size, learning rates, momentum and weight decay (on every parameter).
        images: the training set, on the same device.
        seed: of the epoch plans.
        rank, world: of the processes that share the run, each of which takes every world-th image of a batch.
        autocast: makes the context that forward and loss run in.
        loss_of: `loss_of`, or what `torch.compile` made of it.
    """

    def __init__(
            self,
            model: nn.Module,
            recipe: Recipe,
            images: Images,
            seed: int = 0,
            rank: int = 0,
            world: int = 1,
            autocast: Callable[[], AbstractContextManager] = contextlib.nullcontext,
            loss_of: Callable[[nn.Module, Images, Tensor], tuple[Tensor, Tensor]] = loss_of,
    ):
        self.model, self.recipe, self.images, self.seed = model, recipe, images, seed
        self.rank, self.world, self.autocast, self.loss_of = rank, world, autocast, loss_of
        self.bare = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
        device = images.labels.device
        self.optimizer = torch.optim.SGD(
            self.bare.parameters(), lr=torch.tensor(recipe.lr, device=device), momentum=recipe.momentum,
            weight_decay=recipe.weight_decay, nesterov=recipe.nesterov, fused=True)
        self.parameters = dict(self.bare.named_parameters())
        for p in self.parameters.values():  # zeros, as if there had been a step: the first one is like every other
            self.optimizer.state[p]['momentum_buffer'] = torch.zeros_like(p)
        self.plan = torch.zeros(4, len(images), dtype=torch.int32, device=device)
        self.rates = torch.zeros(self.steps_per_epoch, device=device)  # the learning rates of the epoch's steps
        self.cursor = torch.zeros((), dtype=torch.int64, device=device)  # images of the epoch that are done
        self.offsets = torch.arange(recipe.batch_size, device=device)
        self.loss = torch.zeros((), device=device)  # summed over the epoch's images
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.images) // self.recipe.batch_size)

    def epoch_plan(self, epoch: int) -> Tensor:
        """The plan of an epoch on the CPU, in memory from which a GPU copies without waiting."""
        return self._sendable(epoch_plan(len(self.images), self.seed, epoch))

    def _sendable(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self.plan.is_cuda else tensor

    def seek(self, epoch: int, done: int = 0, plan: Tensor | None = None) -> None:
        """Goes to an epoch (counted from 0) of which `done` images are done; its plan may be at hand already."""
        self.plan.copy_(self.epoch_plan(epoch) if plan is None else plan, non_blocking=True)
        self.cursor.fill_(done)
        first, steps = epoch * self.steps_per_epoch, self.steps_per_epoch
        rates = torch.tensor([self.recipe.lr_at(step, steps) for step in range(first, first + steps)])
        self.rates.copy_(self._sendable(rates), non_blocking=True)
        if done == 0:
            self.loss.zero_()
            self.wrong.zero_()

    def step(self, size: int) -> None:
        """One update from the next `size` columns of the plan."""
        columns = self.plan.index_select(1, self.cursor + self.offsets[:size])[:, self.rank::self.world]
        rate = self.optimizer.param_groups[0]['lr']
        rate.copy_(self.rates.index_select(0, (self.cursor // self.recipe.batch_size).view(1)).view(()))
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            loss, wrong = self.loss_of(self.model, self.images, columns)
        (loss * (self.world / size)).backward()  # averaged over processes: the mean over the whole batch
        self.optimizer.step()
        self.loss += loss.detach()
        self.wrong += wrong
        self.cursor += size

    def state(self) -> dict[str, Tensor]:
        """Every tensor that a step changes, by name; with the position it is all that a run needs to go on."""
        return {
            **{f'model.{name}': tensor for name, tensor in self.bare.state_dict().items()},
            **{f'momentum.{name}': self.optimizer.state[p]['momentum_buffer'] for name, p in self.parameters.items()},
            'meter.loss': self.loss, 'meter.wrong': self.wrong,
        }

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Copies a state into the tensors that are there.

        Raises:
            ValueError: names or shapes are not those of this network.
        """
        own = self.state()
        odd = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
        if odd:
            raise ValueError(f'{len(odd)} of its tensors do not fit the network, such as {odd[0]}')
        for name, tensor in own.items():
            tensor.copy_(state[name])


@contextlib.contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Float32 convolutions and products without TF32, whatever the training uses."""
    if device.type != 'cuda':
        yield
        return
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    try:
        with torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@torch.no_grad()
def logits_of(model: nn.Module, images: Images, columns: Tensor) -> Tensor:
    """Float32 logits (n, classes) of the images that columns name (int32 (4, n)), with the running statistics.

    The images go through in chunks of one size, so that a result does not depend on any batch size chosen elsewhere.
    """
    training, device = model.training, columns.device
    model.eval()
    with exact_float32(device):
        logits = [model(batch(images, chunk)[0])
                  for chunk in columns.split(500 if device.type == 'cuda' else 100, dim=1)]
    model.train(training)
    return torch.cat(logits)


def count_wrong(model: nn.Module, images: Images, columns: Tensor) -> Tensor:
    """How many of the images that columns name the model gets wrong: int64 ()."""
    return (logits_of(model, images, columns).argmax(dim=1) != images.labels[columns[0].long()]).sum()
