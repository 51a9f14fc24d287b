"""Models in the form that every loader of the Hub's ecosystem takes: written, checked and read back."""

from .export import check_export, export_model
from .loading import load_members, load_model


__all__ = ["check_export", "export_model", "load_members", "load_model"]
