"""The epochs of one run or of several side by side, from any position to the end or to a cut."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from timm_nonlocal import spectrum
from timm_nonlocal.errors import last_line
from train.engine.data import Images, whole_plan
from train.engine.execution import Execution
from train.engine.pool import Pool
from train.engine.processes import Processes
from train.engine.progress import Bar
from train.engine.step import Learner, autocast, compiled_loss, count_wrong, loss_of
from train.engine.stop import Stop, StopReason
from train.records.runs import Run, describe_result, surroundings
from train.records.state import Progress, RunError, RunProgress

__all__ = ['Trainer']

ASK = 32  # steps between two agreements of several processes
SAVE = 1  # beside the reasons to stop, less than any of them: save and go on


class Trainer:
    """Runs that share data, batch size and number of epochs, and go through every step together.

    Args:
        runs: one, or several side by side.
        train_set, test_set: on the device to train on.
        execution: how they are computed.
        processes: those that share the run.
        spectrum_epochs: after these epochs (counted from 1) the spectra of the nonlocal modules are kept.

    Raises:
        ValueError: the runs do not fit together, or a name or argument in them does not fit.
    """

    def __init__(self, runs: Sequence[Run], train_set: Images, test_set: Images,
                 execution: Execution | None = None, processes: Processes | None = None,
                 spectrum_epochs: Sequence[int] = ()):
        self.runs, self.train_set, self.test_set = list(runs), train_set, test_set
        self.execution = execution = execution or Execution()
        self.processes, self.spectrum_epochs = processes or Processes(), set(spectrum_epochs)
        self.epochs, self.batch_size = runs[0].recipe.epochs, runs[0].recipe.batch_size
        self.device = train_set.labels.device
        self.where = surroundings(self.device)  # at the end the tree may be another one
        if len({(run.dataset, run.limit, run.recipe.epochs, run.recipe.mean, run.compile, run.test_every)
                for run in runs}) > 1:
            raise ValueError('runs side by side need the same data set and preprocessing, limit, number of epochs, '
                             'test_every and compile')
        rank, world = self.processes.rank, self.processes.world
        smallest = len(train_set) % self.batch_size or self.batch_size
        if smallest < 2 * world:
            raise ValueError(f'the last batch of an epoch has {smallest} images for {world} processes: '
                             f'each needs 2 or more; change --batch-size or --limit')
        loss = compiled_loss() if runs[0].compile else loss_of
        learners = []
        for run in runs:
            model = run.build().to(self.device).to(memory_format=torch.channels_last)
            learners.append(Learner(
                self.processes.wrap(model, execution.sync_bn), run.recipe, train_set, run.seed, rank=rank, world=world,
                autocast=autocast(self.device, run.mixed_precision), loss_of=loss))
        self.learners = learners
        self.pool = Pool.on(self.device, learners, graph=execution.graph and world == 1)
        self.test_columns = whole_plan(len(test_set)).to(self.device)[:, rank::world]
        self.progress: Progress = {
            'epoch': 0, 'images': 0, 'seconds': 0.0, 'data': [len(train_set), len(test_set)],
            'commits': [], 'devices': [],
            'runs': [{'run': run.to_dict(), 'history': [], 'spectra': [], 'diverged_step': None} for run in runs],
        }

    def start_from(self, weights: dict[str, Tensor]) -> None:
        """Begins every run with a trained backbone: its nonlocal modules are the identity, W_Z = 0.

        Raises:
            ValueError: the weights are not those of the networks' backbone.
        """
        for run, learner in zip(self.runs, self.learners, strict=True):
            assert run.start, 'the run says what it starts from'
            try:
                missing, unknown = learner.bare.load_state_dict(weights, strict=False)
            except RuntimeError as error:
                raise ValueError(f'--start {run.start.name} does not fit {run.architecture}: '
                                 f'{last_line(error)}') from error
            other = [*unknown, *(name for name in missing if '.nl.' not in name)]
            if other:
                raise ValueError(f'--start {run.start.name} is not the backbone of {run.architecture}: {other[0]} is '
                                 f'in one of them only')
            for name, parameter in learner.bare.named_parameters():
                if name in missing and name.endswith(('.z.weight', '.z.parametrizations.weight.original')):
                    nn.init.zeros_(parameter)

    # What a run continues from

    def state(self) -> tuple[dict[str, Tensor], Progress]:
        """Every tensor that training changes, `<number of the run>.<name>`, and the progress."""
        tensors = {f'{index}.{name}': tensor
                   for index, learner in enumerate(self.learners) for name, tensor in learner.state().items()}
        for name in [name for name in tensors if '.meter.' in name]:  # summed over the processes
            tensors[name] = self.processes.sum(tensors[name].clone())
        return tensors, self.progress

    def restore(self, tensors: dict[str, Tensor], progress: Progress, source: str) -> None:
        """Goes on from a state that was saved.

        Raises:
            RunError: it is of another number of images or of other networks; `source` names it.
        """
        if progress['data'] != self.progress['data']:
            raise RunError(f'{source} was trained on {progress["data"][0]} images and tested on {progress["data"][1]}, '
                           f'not {len(self.train_set)} and {len(self.test_set)}: check --data-dir')
        for index, learner in enumerate(self.learners):
            prefix = f'{index}.'
            try:
                learner.load_state({name.removeprefix(prefix): tensor for name, tensor in tensors.items()
                                    if name.startswith(prefix)})
            except ValueError as error:
                raise RunError(f'{source} does not fit {self.runs[index].architecture}: {error}') from error
            if not self.processes.first:  # the first process has the sum
                learner.loss.zero_()
                learner.wrong.zero_()
        progress.setdefault('commits', [])  # older states lack all three
        progress.setdefault('devices', [])
        for state in progress['runs']:
            state.setdefault('diverged_step', None)
        self.progress = progress

    # The epochs

    def run(self, stop: Stop, save: Callable[[dict[str, Tensor], Progress], None], save_seconds: float = 60.0,
            bar: Bar | None = None,
            on_epoch: Callable[[list[dict[str, Any] | None]], None] | None = None) -> StopReason:
        """Trains to the end, or to where there is a reason to stop; the state is saved either way.

        Args:
            save: takes a state; called in the first process only.
            save_seconds: how often.
            on_epoch: takes the new row of every run's history, None for a run that ended earlier.

        Returns:
            The reason why it stopped before the end, in every process the same; NONE at the end.
        """
        progress, count = self.progress, len(self.train_set)
        bar = bar or Bar(0, 0, enabled=False)
        for kept, here in ((progress['commits'], self.where['commit']), (progress['devices'], self.where['device'])):
            if here not in kept:
                kept.append(here)
        self.started = time.monotonic() - progress['seconds']
        self.saved, self.save = time.monotonic(), save
        plans = None
        while progress['epoch'] < self.epochs and not self.all_diverged:
            epoch, first, since = progress['epoch'], progress['images'], time.monotonic()
            for index, learner in enumerate(self.learners):
                learner.seek(epoch, first, plans[index] if plans else None)
            while progress['images'] < count:
                size = min(self.batch_size, count - progress['images'])
                self.pool.step(size)
                progress['images'] += size
                bar.advance(size, self._meters)
                if self._asks and self._diverged():
                    break
                if reason := self._look_up(stop, save_seconds, progress['images'] == count):
                    return reason
            wrong, tested = [], self._tested(epoch)
            for learner, test in zip(self.learners, tested, strict=True):
                self.processes.take_firsts_buffers(learner.bare)
                wrong.append(count_wrong(learner.bare, self.test_set, self.test_columns) if test else learner.wrong)
            plans = [learner.epoch_plan(epoch + 1) for learner in self.learners]  # while the device is busy
            sums = self.processes.sum(torch.stack(
                [torch.stack([learner.loss, learner.wrong.float(), test.float()])  # counts below 2²⁴ are exact
                 for learner, test in zip(self.learners, wrong, strict=True)])).tolist()  # waits for the device
            rows = self._note(epoch, sums, time.monotonic() - since, progress['images'] - first, tested)
            progress['epoch'], progress['images'] = epoch + 1, 0
            bar.epoch([row for row in rows if row], self.epochs)
            if on_epoch:
                on_epoch(rows)
        self._save()
        return StopReason.NONE

    def _tested(self, epoch: int) -> list[bool]:
        """Whose error is tested after an epoch, counted from 0; after the last one that a run does it always is."""
        if (epoch + 1) % self.runs[0].test_every == 0 or epoch + 1 == self.epochs:
            return [True] * len(self.runs)
        self._diverged()
        return [state['diverged_step'] is not None and not ended(state) for state in self.progress['runs']]

    @property
    def _asks(self) -> bool:
        """Whether what waits for the device, or for other processes, is asked after this step."""
        return self.progress['images'] // self.batch_size % ASK == 0

    @property
    def _step(self) -> int:
        """How many steps are done."""
        return (self.progress['epoch'] * self.learners[0].steps_per_epoch
                + -(-self.progress['images'] // self.batch_size))

    def _diverged(self) -> bool:
        """Notes where a loss is first seen not to be finite; whether that is so of every run."""
        losses = self.processes.sum(torch.stack([learner.loss for learner in self.learners])).tolist()
        for loss, state in zip(losses, self.progress['runs'], strict=True):
            if not math.isfinite(loss) and state['diverged_step'] is None:
                state['diverged_step'] = self._step
        return all(state['diverged_step'] is not None for state in self.progress['runs'])

    def _meters(self) -> str:
        going = [learner for learner, state in zip(self.learners, self.progress['runs'], strict=True)
                 if state['diverged_step'] is None] or self.learners
        seen = len(going) * self.progress['images'] / self.processes.world
        loss, wrong = (sum(meter.item() for meter in meters) / seen
                       for meters in zip(*((learner.loss, learner.wrong) for learner in going), strict=True))
        return f'loss {loss:.3f}, accuracy {100 - 100 * wrong:.1f} %'

    def _look_up(self, stop: Stop, save_seconds: float, epoch_ends: bool) -> StopReason:
        """Saves where it is time to, and gives the reason to stop."""
        now = time.monotonic()
        wish = stop.reason or SAVE * (now - self.saved > save_seconds)
        if self.processes.world > 1:
            if not (epoch_ends or self._asks):
                return StopReason.NONE
            wish = self.processes.highest(wish, self.device)
        if wish:
            self._save()
        return StopReason.NONE if wish == SAVE else StopReason(wish)

    def _save(self) -> None:
        self.saved = time.monotonic()
        self.progress['seconds'] = self.saved - self.started
        tensors, progress = self.state()
        if self.processes.first:
            self.save(tensors, progress)

    @property
    def all_diverged(self) -> bool:
        """Whether no run can go on: a loss that is not finite leaves weights that never become finite again."""
        return all(map(ended, self.progress['runs']))

    def _note(self, epoch: int, sums: list[list[float]], seconds: float, images: int,
              tested: list[bool]) -> list[dict[str, Any] | None]:
        """Adds an epoch to the histories; sums are the training loss, training and test images that are wrong."""
        rows: list[dict[str, Any] | None] = []
        (_, test_count), train_count = self.progress['data'], self.progress['images']
        steps = self.learners[0].steps_per_epoch
        for run, learner, state, (loss, wrong, test), looked in zip(
                self.runs, self.learners, self.progress['runs'], sums, tested, strict=True):
            if ended(state):
                rows.append(None)
                continue
            row = {
                'epoch': epoch + 1, 'step': state['diverged_step'] or self._step,
                'lr': run.recipe.lr_at(epoch * steps, steps),
                'train_loss': loss / train_count if math.isfinite(loss) else None,
                'train_error': 100 * wrong / train_count,
                'test_error': 100 * test / test_count if looked else None,
                'test_wrong': round(test) if looked else None,
                'images_per_second': images / seconds, 'seconds': seconds,
            }
            rows.append(row)
            state['history'].append(row)
            blocks = spectrum(learner.bare) if epoch + 1 in self.spectrum_epochs else []
            if blocks and all(block.eigenvalues is not None for block in blocks):  # None where weights are not finite
                state['spectra'].append({'epoch': epoch + 1, 'blocks': [block.to_dict() for block in blocks]})
        return rows

    # What is left of them

    def results(self, **more: Any) -> list[tuple[dict[str, Any], dict[str, Tensor]]]:
        """For every finished run its line of results (without the weights' sha256) and its weights on the CPU."""
        return [(describe_result(run, state['history'], self.progress['data'], state['spectra'],
                                 seconds=self.progress['seconds'], at_once=len(self.runs),
                                 **{**self.where, 'device': ', '.join(self.progress['devices'])},
                                 commits=self.progress['commits'],
                                 **{**asdict(self.execution), 'graph': self.pool.graphs is not None}, **more),
                 {name: tensor.cpu().contiguous() for name, tensor in learner.bare.state_dict().items()})
                for run, learner, state in zip(self.runs, self.learners, self.progress['runs'], strict=True)]


def ended(state: RunProgress) -> bool:
    """Whether a run's loss was not finite in the last epoch that it has: no weight becomes finite again."""
    return bool(state['history']) and state['history'][-1]['train_loss'] is None
