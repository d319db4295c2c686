"""Where a campaign's runs are computed: processes of this machine, or a Ray cluster.

An engine has `slots`, each of which takes one run at a time, `gpu` (whether a slot is one), and
`begin(words, slot, log, mixed_precision)`, which starts a Python script with its arguments and gives a task: `poll()`
is None while it runs and then its exit code, and `stop()` asks it to save and end.
"""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, Protocol

import torch

from train.engine.stop import StopReason
from train.records.runs import ROOT

__all__ = ['ENGINES', 'Local', 'Ray', 'Task']

LOST = 1  # the exit code of a run that never came back


class Task(Protocol):
    def poll(self) -> int | None: ...
    def stop(self) -> None: ...


class LocalTask:
    def __init__(self, process: subprocess.Popen):
        self.process, self.poll = process, process.poll

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)


class Local:
    """One process a core of this process's affinity mask, with one thread, or one a GPU.

    Args:
        jobs: so many at once; on cores no more than there are, on GPUs several share one.
    """

    def __init__(self, jobs: int | None = None):
        gpus, everywhere = torch.cuda.device_count(), range(os.cpu_count() or 1)
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else list(everywhere)
        self.gpu, self.slots = gpus > 0, list(range(jobs or gpus)) if gpus else cores[:jobs]
        visible = os.environ.get('CUDA_VISIBLE_DEVICES')  # device_count() counts these alone
        self.devices = visible.split(',') if visible else list(map(str, range(gpus)))

    def begin(self, words: list[str], slot: int, log: Path, mixed_precision: str) -> Task:
        environment = {**os.environ, 'ACCELERATE_MIXED_PRECISION': mixed_precision}
        environment |= ({'CUDA_VISIBLE_DEVICES': self.devices[slot % len(self.devices)]} if self.gpu
                        else {'OMP_NUM_THREADS': '1'})
        with open(log, 'a') as file:
            process = subprocess.Popen(
                [sys.executable, *words], env=environment, stdout=file, stderr=file,
                start_new_session=True)  # a Ctrl-C reaches it through us alone
        if not self.gpu and hasattr(os, 'sched_setaffinity'):
            with contextlib.suppress(ProcessLookupError):  # it has ended already
                os.sched_setaffinity(process.pid, {slot})
        return LocalTask(process)


class RayTask:
    def __init__(self, reference: Any):
        self.reference = reference

    def poll(self) -> int | None:
        import ray
        if not ray.wait([self.reference], timeout=0)[0]:
            return None
        try:
            return ray.get(self.reference)
        except ray.exceptions.TaskCancelledError:
            return StopReason.SIGNAL
        except ray.exceptions.RayError:
            return LOST

    def stop(self) -> None:
        import ray
        ray.cancel(self.reference, force=False)  # a KeyboardInterrupt, which the training takes for a Ctrl-C


class Ray:
    """One run a CPU or a GPU of a Ray cluster, whose machines share the folders of code, data and runs.

    A run whose worker is lost goes on in another one, from the state in its folder.

    Args:
        jobs: at most so many at once.

    Raises:
        ValueError: Ray is not installed, or its cluster has nothing to compute on.
    """

    def __init__(self, jobs: int | None = None):
        try:
            import ray
        except ImportError as error:
            raise ValueError("--engine ray needs Ray: pip install 'timm_nonlocal[ray]'") from error
        if not ray.is_initialized():
            ray.init(log_to_driver=False, configure_logging=False, include_dashboard=False)
        resources = ray.cluster_resources()
        self.gpu = resources.get('GPU', 0) >= 1
        self.slots = list(range(int(resources.get('GPU' if self.gpu else 'CPU', 0))))[:jobs]
        if not self.slots:
            raise ValueError('--engine ray: the cluster has neither CPUs nor GPUs')

    def begin(self, words: list[str], slot: int, log: Path, mixed_precision: str) -> Task:
        import ray
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))
        environment = {'PYTHONPATH': path, 'ACCELERATE_MIXED_PRECISION': mixed_precision, 'OMP_NUM_THREADS': '1'}
        task = ray.remote(max_calls=1)(run_here).options(
            num_cpus=0 if self.gpu else 1, num_gpus=1 if self.gpu else 0, max_retries=-1,
            runtime_env={'env_vars': environment})
        return RayTask(task.remote(words, str(log.absolute()), os.getcwd()))


def run_here(words: list[str], log: str, folder: str) -> int:
    """A script with its arguments in this process, which ends with it. Gives the exit code."""
    os.chdir(folder)
    sys.argv = words
    with open(log, 'a') as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            runpy.run_path(words[0], run_name='__main__')
        except SystemExit as end:
            return int(end.code or 0)
        except Exception:
            traceback.print_exc()
            return LOST
    return 0


ENGINES: dict[str, type[Local] | type[Ray]] = {'local': Local, 'ray': Ray}
