"""Lets torchvision take a small CIFAR-10 folder for the real one, by its own md5 sums. Standard library only."""

import importlib.util
import json
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def accepted(dataset: Any, md5_file: str | os.PathLike[str]) -> dict[str, Any]:
    """The class attributes of torchvision's CIFAR10 with the md5 sums of a file in place of the published ones."""
    with open(md5_file) as file:
        sums = json.load(file)
    return {'train_list': [[name, sums[name]] for name, _ in dataset.train_list],
            'test_list': [[name, sums[name]] for name, _ in dataset.test_list],
            'meta': {**dataset.meta, 'md5': sums['batches.meta']}}


def accept_when_imported(md5_file: str) -> None:
    """Puts them in place once this process imports torchvision.datasets.cifar."""
    class Finder:
        def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
            if name != 'torchvision.datasets.cifar':
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            assert spec and spec.loader
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                for key, value in accepted(module.CIFAR10, md5_file).items():
                    setattr(module.CIFAR10, key, value)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Finder())
