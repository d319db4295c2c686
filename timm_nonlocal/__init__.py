"""Nonlocal blocks (eq. (1)) and nonlocal stages (eq. (8)) for timm and torchvision.

Importing this puts the networks into timm's registry and the PreResNets into torchvision's.
"""

from . import resnet_nl, torchvision_models  # noqa: F401 (they register)
from .blocks import NonlocalBlock, NonlocalBlocks, NonlocalStage
from .insert import insert, remove
from .preresnet import PreResNet
from .spectrum import spectrum

__version__ = '0.1.0'
__all__ = ['NonlocalBlock', 'NonlocalBlocks', 'NonlocalStage', 'PreResNet', 'insert', 'remove', 'spectrum']
