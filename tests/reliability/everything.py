"""All situations, in the order of the table."""

from reliability import options
from reliability.tiny import TEMPLATES


MODULES = (options,)
SITUATIONS = [situation for module in MODULES for situation in module.SITUATIONS]

assert len({situation.id for situation in SITUATIONS}) == len(SITUATIONS), "two situations have one name"
__all__ = ["SITUATIONS", "TEMPLATES"]
