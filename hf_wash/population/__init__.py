"""
Who the members are and where they live: layout and collectives (`population`), random streams (`streams`), what all
processes must agree on (`agreement`), what may differ between members (`overrides`), how far apart they are
(`consensus`). Knows torch and NumPy; how members are trained, mixed or evaluated is left to others.
"""

from .overrides import MemberOverrides
from .population import Population, check_can_be_copied, copy_member, grow_buffers, share_frozen
from .streams import RandomStreams


__all__ = [
    "MemberOverrides", "Population", "RandomStreams", "check_can_be_copied", "copy_member", "grow_buffers", "share_frozen",
]  # fmt: skip
