"""The command `quotesmith`: entrypoint.py, with signals handled before its imports."""

from pipeline import signals


def main() -> None:
    signals.handle()
    import entrypoint

    entrypoint.main()
