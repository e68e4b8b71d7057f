"""quotesmith: a bucket of quotes in, one small GGUF model that speaks in that voice out."""

__version__ = "0.1.0"
