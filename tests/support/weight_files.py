"""A copy of the project with briefly trained weights in it, and processes that publish from it and load from the Hub.

The weights learned from a hundred random images: what they are good for is to go the way that trained ones will go.
They live in a temporary folder and never in the repository.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hub.results import Record, recipe_for
from tests.support.hub_double import HubDouble

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = ('preresnet20', 'preresnet20_nl_proposed_k4')
TRAIN = """
import sys
from train.cifar import main
data, *networks = sys.argv[1:]
for network in networks:
    code = main(['--model', network, '--data-dir', data, '--output-dir', f'runs/{network}', '--epochs', '2',
                 '--batch-size', '40', '--threads', '1'])
    if code:
        sys.exit(code)
"""


def made_up(architecture: str = 'preresnet20', dataset: str = 'cifar10', seed: int = 0, error: float = 8.0,
            **more: Any) -> Record:
    """A line of results.jsonl that no training wrote."""
    return {'architecture': architecture, 'dataset': dataset, 'seed': seed, 'limit': 0, 'model_kwargs': [],
            'recipe': recipe_for(architecture, 'paper').to_dict(), 'mixed_precision': 'no', 'final_error': error,
            'best_error': error - 0.5, 'best_epoch': 150, 'train_loss': [2.0, 0.1], 'train_error': [80.0, 1.0],
            'test_error': [80.0, error], 'sha256': f'{architecture}{dataset}{seed}', **more}


class Project:
    """The copy; `root` is its top. Its commands run as a user runs them, in processes of their own."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @classmethod
    def make(cls, root: Path, data: Path) -> 'Project':
        """Trains, lands the weights and their lines as a campaign does, and draws and writes what is made from them."""
        project, results, weights = cls(root), root / 'hub/results.jsonl', root / 'timm_nonlocal/weights'
        for part in ('timm_nonlocal', 'hub', 'train', 'MODEL_CARD.md'):
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
            copy(ROOT / part, root / part)
        for made in (weights, root / 'hub/models'):  # of the project's own weights
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
        results.write_text('')
        project.check('-c', TRAIN, str(data), *NETWORKS, PYTHONPATH=f'{root}{os.pathsep}{data}')
        for network in NETWORKS:
            run = root / 'runs' / network
            shutil.copy(run / 'model.safetensors', weights / f'{network}.cifar10.safetensors')
            with open(results, 'a') as file:
                file.write((run / 'results.jsonl').read_text())
        project.check('-c', 'from hub import cards, figures; figures.main([]); cards.main([])')
        return project

    def environment(self, **more: str) -> dict[str, str]:
        """This environment without anything of the Hub's in it, with the copy's packages first."""
        env = {name: value for name, value in os.environ.items() if not name.startswith(('HF_', 'HUGGING'))}
        return {**env, 'PYTHONPATH': str(self.root), 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1',
                'HF_HUB_DISABLE_TELEMETRY': '1', **more}

    @staticmethod
    def client(hub: HubDouble, home: Path, **more: str) -> dict[str, str]:
        """What turns a Hub client to the double, with nothing in its cache."""
        return {'HF_ENDPOINT': hub.url, 'HF_HOME': str(home), 'HF_HUB_DISABLE_XET': '0' if hub.xet else '1', **more}

    def check(self, *command: str, **env: str) -> str:
        """What a command prints that must not fail."""
        done = self.run(*command, **env)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, *command: str, **env: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *command], cwd=self.root, env=self.environment(**env),
                              capture_output=True, text=True, timeout=600)


BUILT = """
import shutil
import sys
from pathlib import Path
from typing import Any
import hub.publish as command
build = command.build

def copy_built(file, runs, namespace, folder):
    built = Path('built', file.name)
    if not built.is_dir():
        built.mkdir(parents=True)
        build(file, runs, namespace, built)
    shutil.copytree(built, folder, dirs_exist_ok=True)

command.build = copy_built
"""
PUBLISH = f'{BUILT}sys.exit(command.main(sys.argv[1:]))'
UNVERIFIED = f'{BUILT}command.verify = lambda *arguments, **options: None\n'
PUBLISHER = """\
try:
    answer = command.main(ask['argv'])
except SystemExit as stop:
    answer = stop.code"""


class Worker:
    """A Python process that answers JSON lines: what `code` makes of `ask` in `answer`.

    It spares every step of a test the seconds that importing torch takes.
    """

    LOOP = """
import contextlib, io, json, sys
{setup}
for line in sys.stdin:
    ask, said, answer = json.loads(line), io.StringIO(), None
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        {code}
    print(json.dumps([answer, said.getvalue()]), flush=True)
"""

    def __init__(self, setup: str, code: str, env: dict[str, str], cwd: Path, python: str = sys.executable,
                 wrapper: tuple[str, ...] = ()) -> None:
        program = self.LOOP.format(setup=setup, code=code.replace('\n', '\n        '))
        self.process = subprocess.Popen([*wrapper, python, '-c', program], cwd=cwd, env=env, text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __call__(self, **ask: Any) -> list:
        """The answer and what was printed."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(ask) + '\n')
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f'the worker ended with {self.process.wait()}'
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
