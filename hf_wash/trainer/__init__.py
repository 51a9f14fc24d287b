"""
The Trainer that holds a population. Left to others: what is exchanged (`mixing`), how a soup is made (`soup`), who the
members are (`population`), how a model becomes a repository (`hub`).

The classes are in `mixin` and `wash_trainer`; nothing is imported here, so that `checkpoint` can be read without transformers.
"""
