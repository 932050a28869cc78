"""``python -m osler.cli``, which is how torchrun starts Osler."""

from osler.cli.main import program

if __name__ == "__main__":
    program()
