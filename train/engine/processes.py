"""One run on several processes: who takes what, and how they agree."""

import gc

import torch
from accelerate import Accelerator
from torch import Tensor, nn

__all__ = ['Processes', 'end']


class Processes:
    """The processes that share a run. Each takes every `world`-th image of a batch, from its rank on.

    Args:
        accelerator: of `accelerate`, which the processes were launched for; None is one process alone.
    """

    def __init__(self, accelerator: Accelerator | None = None):
        self.accelerator = accelerator if accelerator and accelerator.num_processes > 1 else None
        self.rank = self.accelerator.process_index if self.accelerator else 0
        self.world = self.accelerator.num_processes if self.accelerator else 1

    @property
    def first(self) -> bool:
        """Whether this process writes and prints."""
        return self.rank == 0

    def wrap(self, model: nn.Module, sync_bn: bool = False) -> nn.Module:
        """The model with its gradients averaged over the processes, and its batch statistics too if asked."""
        if not self.accelerator:
            return model
        if sync_bn:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        cuda = self.accelerator.device.type == 'cuda'
        return nn.parallel.DistributedDataParallel(model, [self.accelerator.device] if cuda else None)

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum over the processes, in every one of them."""
        return self.accelerator.reduce(numbers, 'sum') if self.accelerator else numbers

    def highest(self, number: int, device: torch.device) -> int:
        """The highest of the processes' numbers, so that all do the same at the same step."""
        if not self.accelerator:
            return number
        highest = torch.tensor(number, device=device)
        torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
        return int(highest)

    def take_firsts_buffers(self, model: nn.Module) -> None:
        """Gives every process the first one's running statistics, which are the ones that are saved."""
        if self.accelerator:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)


def end(accelerator: Accelerator) -> None:
    """Ends the trackers and the processes' group, which must not outlive Python.

    A thread of the group that lets go of a tensor while Python shuts down aborts the process. The group waits for its
    threads when the last model that holds it is gone, so call this where no wrapped model is left.
    """
    gc.collect()
    accelerator.end_training()
