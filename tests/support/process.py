"""Our commands as a user runs them, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str, data: Path | None = None, env: dict[str, str] | None = None,
        **options: Any) -> subprocess.CompletedProcess[str]:
    """Runs `python …` in a process of its own, with the small data's md5 sums where `data` is given."""
    path = [str(ROOT), *([str(data)] if data else [])]
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(path), 'CUDA_VISIBLE_DEVICES': '', **(env or {})}
    return subprocess.run([sys.executable, *command], env=env, capture_output=True, text=True, timeout=600, **options)
