"""Lets torchvision take a small CIFAR-10 folder for the real one, by its own md5 sums. Standard library only."""

import importlib.util
import json
import sys


def accepted(dataset: type, md5_file) -> dict:
    """The class attributes of torchvision's CIFAR10 with the md5 sums of a file in place of the published ones."""
    with open(md5_file) as file:
        sums = json.load(file)
    return {'train_list': [[name, sums[name]] for name, _ in dataset.train_list],
            'test_list': [[name, sums[name]] for name, _ in dataset.test_list],
            'meta': {**dataset.meta, 'md5': sums['batches.meta']}}


def accept_when_imported(md5_file: str) -> None:
    """Puts them in place once this process imports torchvision.datasets.cifar."""
    class Finder:
        def find_spec(self, name, path=None, target=None):
            if name != 'torchvision.datasets.cifar':
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                for key, value in accepted(module.CIFAR10, md5_file).items():
                    setattr(module.CIFAR10, key, value)

            spec.loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Finder())
