"""So that `python -m hf_wash.cli` is `hf-wash`."""

from .main import main


main()
