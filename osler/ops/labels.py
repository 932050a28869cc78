"""The label of a token that is not learned. Torch-free."""

IGNORED = -100
