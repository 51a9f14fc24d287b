"""Models in the form that every loader of the Hub's ecosystem takes: written, checked and read back."""

from .export import CannotCheck, check_export, export_model, folder_problem, is_image_classifier, writing_here
from .loading import load_members, load_model


__all__ = [
    "CannotCheck",
    "check_export",
    "export_model",
    "folder_problem",
    "is_image_classifier",
    "load_members",
    "load_model",
    "writing_here",
]
