"""The command `pace`. What a model says goes to stdout; progress, figures and errors go to stderr."""

from .commands import main

__all__ = ["main"]
