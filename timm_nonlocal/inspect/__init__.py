"""The command that reports what every nonlocal block of a network has learned."""

from .command import main

__all__ = ['main']
