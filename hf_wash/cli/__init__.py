"""
`hf-wash`, the command line: soups of models that are there already, and runs inspected, described and pushed.

A file for each command; what a command does is done elsewhere. Nothing heavy is imported before a command needs it.
"""

from .app import main


__all__ = ["main"]
