"""Nonlocal blocks (eq. (1)) and nonlocal stages (eq. (8)) for timm and torchvision.

Importing this puts the networks into timm's registry and the PreResNets into torchvision's.
"""

from .analysis.spectra import spectrum
from .layers.blocks import NonlocalBlock, NonlocalBlocks, NonlocalStage
from .layers.insertion import insert, remove
from .models import resnet_nl, torchvision_models  # noqa: F401 (they register)
from .models.preresnet import PreResNet

__version__ = '0.1.0'
__all__ = ['NonlocalBlock', 'NonlocalBlocks', 'NonlocalStage', 'PreResNet', 'insert', 'remove', 'spectrum']
