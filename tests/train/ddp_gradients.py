"""Run by two processes: how far the gradients they share are from those of one process, and whether the plan is one.

The network uses its running statistics, so that halves of a batch mean the same as the whole; all of it in float64.
"""

import sys
from dataclasses import replace

import torch
from accelerate import Accelerator

from tests.support.training import random_images
from timm_nonlocal.recipes import Recipe
from train.engine.processes import Processes, end
from train.engine.step import Learner
from train.records.runs import Run

accelerator, images = Accelerator(cpu=True), random_images(45)
images = replace(images, mean=images.mean.double())
torch.set_num_threads(1)
run = Run('preresnet20_nl_proposed_k2', recipe=Recipe(batch_size=32))


def after(steps: list[int], processes: Processes) -> Learner:
    model = run.build().double().eval()
    learner = Learner(processes.wrap(model), run.recipe, images, rank=processes.rank, world=processes.world)
    learner.seek(3)
    for size in steps:
        learner.step(size)
    return learner


def compare(shared: Processes) -> None:
    for steps in ([32], [32, 13]):  # the last batch is odd: 7 images for one process and 6 for the other
        ours, alone = after(steps, shared), after(steps, Processes())
        error = max(((p.grad - q.grad).abs().max() / q.grad.abs().max()).item()
                    for p, q in zip(ours.parameters.values(), alone.parameters.values(), strict=True))
        loss = (shared.sum(ours.loss) / alone.loss - 1).abs().item()
        same_plan = torch.equal(ours.plan, alone.plan) and shared.sum(ours.wrong).item() == alone.wrong.item()
        sys.stdout.write(f'{error:.3e} {loss:.3e} {same_plan}\n')


assert accelerator.num_processes == 2
compare(Processes(accelerator))
end(accelerator)
