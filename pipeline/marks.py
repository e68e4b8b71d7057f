"""Quotation marks round a quote, which the model should not learn: straight and curly, paired or half lost."""

from __future__ import annotations

LEFT, RIGHT = "\u2018", "\u2019"  # the curly single marks; the right one is an apostrophe too
PAIRS = {'"': '"”', "“": '”"', "„": "“”", "«": "»", LEFT: RIGHT, "'": "'" + RIGHT}
SINGLE = "'" + LEFT + RIGHT
DOUBLE = '"“”„«»'
OPENING = '"“„«'
CLOSING = '"”»'
BEFORE_OPENING = "([{-\u2013—" + OPENING + "'" + LEFT


def strip_marks(text: str) -> str:
    """The quote without marks that wrap the whole of it, or a double mark at one end that lost its partner."""
    while True:
        if wrapped(text):
            text = text[1:-1].strip()
        elif text[:1] in OPENING and has_one_mark(text):
            text = text[1:].strip()
        elif text[-1:] in CLOSING and has_one_mark(text) and not text[-2:-1].isdigit():  # 6'2" is a height
            text = text[:-1].strip()
        else:
            return text


def has_one_mark(text: str) -> bool:
    return sum(char in DOUBLE for char in text) == 1


def wrapped(text: str) -> bool:
    """The first mark's partner is the last character: "a" and "b" is not wrapped, "say "a" twice" is."""
    if len(text) < 2 or text[-1] not in PAIRS.get(text[0], ""):
        return False
    kind = SINGLE if text[0] in SINGLE else DOUBLE
    depth = 0
    for position, char in enumerate(text):
        if char not in kind or is_apostrophe(text, position):
            continue
        depth += 1 if opens(text, position) else -1
        if depth <= 0 and position < len(text) - 1:
            return False
    return depth == 0


def opens(text: str, position: int) -> bool:
    """A straight mark opens at the start of a word: after a space, a bracket, a dash or another opening mark."""
    char = text[position]
    if position == len(text) - 1:
        return False
    if char not in "\"'":
        return char in OPENING or char == LEFT
    before = text[position - 1] if position else " "
    return before.isspace() or before in BEFORE_OPENING


def is_apostrophe(text: str, position: int) -> bool:
    return 0 < position < len(text) - 1 and text[position - 1].isalnum() and text[position + 1].isalnum()
