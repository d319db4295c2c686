"""Several learners side by side: eagerly, or as one CUDA graph that holds a whole step of all of them.

A graph removes the launch of every kernel from the host; streams inside it let the small kernels of several learners
share the device. Nothing else changes: a learner computes in a pool what it computes alone.
"""

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from train.engine.step import Learner

__all__ = ['WARM_UP', 'CudaGraphs', 'Pool']

WARM_UP = 3  # steps in front of a capture: libraries choose algorithms and allocate workspaces in the first ones
AHEAD = 64  # steps after which the host waits for the device to come near, so that a stop or a deadline is seen in time


class CudaGraphs:
    """Captures functions of one device. All graphs share one capture stream, its side streams and one memory pool.

    Keep the object while any of its graphs is in use: a graph holds workspaces that belong to its streams, and they go
    when another graph of the same streams goes.

    Args:
        device: a CUDA device.
        branches: how many functions a graph runs side by side.
    """

    def __init__(self, device: torch.device, branches: int):
        self.streams = [torch.cuda.Stream(device) for _ in range(branches)]
        self.memory = torch.cuda.graph_pool_handle()

    def side_by_side(self, functions: list[Callable[[], None]]) -> None:
        """Runs each function on its own stream: forked from the first one's, the current one, and joined to it."""
        main, *sides = self.streams
        for side in sides:
            side.wait_stream(main)
        functions[0]()
        for side, function in zip(sides, functions[1:], strict=True):
            with torch.cuda.stream(side):
                function()
        for side in sides:
            main.wait_stream(side)

    @contextmanager
    def warming_up(self) -> Iterator[None]:
        """Puts the capture stream in front, behind what was asked of the current one."""
        outside = torch.cuda.current_stream(self.streams[0].device)
        self.streams[0].wait_stream(outside)
        with torch.cuda.stream(self.streams[0]):
            yield
        outside.wait_stream(self.streams[0])

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """A graph of what function asks of the device, nothing of it done yet; calling the result does it."""
        gc.collect()  # nothing that owns device memory may be freed by chance during the capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.memory, stream=self.streams[0]):
            function()
        return graph.replay


class Pool:
    """Learners that take every step together.

    Args:
        learners: on one device, with the same number of images and the same batch size.
        graphs: captures the steps, where they can be; None runs them one learner after the other.
    """

    def __init__(self, learners: list[Learner], graphs: CudaGraphs | None = None):
        first = learners[0]
        for other in learners[1:]:
            if (len(other.images), other.recipe.batch_size) != (len(first.images), first.recipe.batch_size):
                raise ValueError('learners of one pool need the same number of images and the same batch size')
        self.learners, self.graphs, self.steps = learners, graphs, 0
        self.replay: dict[int, Callable[[], None]] = {}  # by batch size
        self.pace = torch.cuda.Event(blocking=True) if first.plan.is_cuda else None
        if graphs:
            self._capture(graphs)

    @classmethod
    def on(cls, device: torch.device, learners: list[Learner], graph: bool = True) -> 'Pool':
        """A pool with graphs where the device has them and they are wanted."""
        return cls(learners, CudaGraphs(device, len(learners)) if graph and device.type == 'cuda' else None)

    @property
    def sizes(self) -> list[int]:
        """The batch sizes of an epoch: the recipe's, and that of the last batch where it is smaller."""
        count, size = len(self.learners[0].images), self.learners[0].recipe.batch_size
        return sorted({min(size, count), count % size or size}, reverse=True)

    def step(self, size: int) -> None:
        """One step of every learner, from the next `size` columns of its plan."""
        if self.pace and self.steps % AHEAD == 0:
            self.pace.synchronize()  # recorded AHEAD steps ago: the device still has those steps to do
            self.pace.record()
        self.steps += 1
        if size in self.replay:
            self.replay[size]()
        else:
            for learner in self.learners:
                learner.step(size)

    def _capture(self, graphs: CudaGraphs) -> None:
        """One graph for each batch size; none where something in a step waits for the device. Leaves no trace."""
        before = [{name: tensor.clone() for name, tensor in learner.state().items()} for learner in self.learners]
        cursors = [learner.cursor.clone() for learner in self.learners]

        def side_by_side(size: int) -> None:
            graphs.side_by_side([partial(learner.step, size) for learner in self.learners])

        with graphs.warming_up():
            for size in self.sizes:
                for _ in range(WARM_UP):
                    for learner in self.learners:
                        learner.cursor.zero_()
                    side_by_side(size)
        try:
            self.replay = {size: graphs.capture(partial(side_by_side, size)) for size in self.sizes}
        except RuntimeError as error:
            warnings.warn(f'steps run kernel by kernel, in no CUDA graph: {str(error).splitlines()[0]}', stacklevel=2)
        for learner, state, cursor in zip(self.learners, before, cursors, strict=True):
            learner.load_state(state)
            learner.cursor.copy_(cursor)
