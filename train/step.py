"""The recipe, and one training step of it."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.data import Images, batch


@dataclass(frozen=True)
class Recipe:
    """The paper's section 3.1; the batch size is not stated there but follows from its "32k and 48k iterations"."""

    epochs: int = 164
    batch_size: int = 128
    lr: float = 0.1
    milestones: tuple[int, ...] = (81, 122)
    gamma: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-4

    def lr_at(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return self.lr * self.gamma ** sum(epoch >= milestone for milestone in self.milestones)


class Learner:
    """One network with its optimizer and the meters of the epoch it is in.

    Args:
        model: the network on its device, wrapped for data parallelism where there are several processes.
        recipe: batch size, learning rates, momentum and weight decay (on every parameter).
        world: the number of processes; each gives `step` its own share of a batch.
        autocast: makes the context that forward and loss run in.
    """

    def __init__(
            self,
            model: nn.Module,
            recipe: Recipe,
            world: int = 1,
            autocast: Callable[[], AbstractContextManager] = nullcontext,
    ):
        self.model, self.recipe, self.world, self.autocast = model, recipe, world, autocast
        self.parameters = {name.removeprefix('module.'): p for name, p in model.named_parameters()}
        self.optimizer = torch.optim.SGD(
            model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        device = next(model.parameters()).device
        self.loss = torch.zeros((), dtype=torch.float64, device=device)  # summed over the epoch's images
        self.wrong = torch.zeros((), dtype=torch.int64, device=device)

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group['lr'] = lr

    def reset_meters(self) -> None:
        self.loss.zero_()
        self.wrong.zero_()

    def step(self, images: Images, columns: Tensor, count: int) -> None:
        """One update from this process's columns of the plan, of `count` in the whole batch."""
        x, y = batch(images, columns)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            logits = self.model(x)
            loss = F.cross_entropy(logits, y, reduction='sum')
        (loss * (self.world / count)).backward()  # averaged over processes: the mean over the whole batch
        self.optimizer.step()
        self.loss += loss.detach()
        self.wrong += (logits.detach().argmax(dim=1) != y).sum()

    def momentum(self) -> dict[str, Tensor]:
        """The optimizer's memory by parameter name; empty before the first step."""
        return {name: self.optimizer.state[p]['momentum_buffer']
                for name, p in self.parameters.items() if p in self.optimizer.state}

    def load_momentum(self, momentum: dict[str, Tensor]) -> None:
        for name, tensor in momentum.items():
            p = self.parameters[name]
            self.optimizer.state[p]['momentum_buffer'] = torch.empty_like(p).copy_(tensor)


@torch.no_grad()
def count_wrong(model: nn.Module, images: Images, columns: Tensor, batch_size: int = 500) -> Tensor:
    """How many of the images that columns name (int32 (4, n)) the model gets wrong, in float32: int64 ()."""
    training = model.training
    model.eval()
    wrong = torch.zeros((), dtype=torch.int64, device=columns.device)
    for part in columns.split(batch_size, dim=1):
        x, y = batch(images, part)
        logits = model.forward_head(model.forward_features(x))  # not forward(), which accelerate wraps in autocast
        wrong += (logits.argmax(dim=1) != y).sum()
    model.train(training)
    return wrong
