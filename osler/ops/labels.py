"""The label of a token that is not learned: data writes it, loss and scores leave it out. Torch-free."""

IGNORED = -100
