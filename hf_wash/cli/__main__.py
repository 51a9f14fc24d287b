"""So that `python -m hf_wash.cli` is `hf-wash`."""

from . import main


main()
