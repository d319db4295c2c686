"""The operator of eqs. (1) and (8): one custom operator of torch with its backends."""

from .stage import BACKENDS, can_run_triton, nonlocal_stage

__all__ = ['BACKENDS', 'can_run_triton', 'nonlocal_stage']
