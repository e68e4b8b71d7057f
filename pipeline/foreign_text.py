"""Text out of a file that anybody can have written, on its way to a message."""


def printable(text: object, longest: int) -> str:
    """On one line, and without what a terminal obeys."""
    return "".join(char for char in " ".join(str(text).split()) if char.isprintable())[:longest]
