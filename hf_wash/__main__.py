"""So that `python -m hf_wash` is `hf-wash`."""

from .cli import main


main()
