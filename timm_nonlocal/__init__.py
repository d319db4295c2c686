"""Nonlocal blocks (eq. (1)) and nonlocal stages (eq. (8)) for timm: importing this registers the PreResNets."""

from .blocks import NonlocalBlock, NonlocalBlocks, NonlocalStage
from .preresnet import PreResNet
from .spectrum import spectrum

__version__ = '0.1.0'
__all__ = ['NonlocalBlock', 'NonlocalBlocks', 'NonlocalStage', 'PreResNet', 'spectrum']
