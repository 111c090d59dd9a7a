"""shortcut: tokenize, train, evaluate and sample cross-layer attention models on sound, music and text."""

__version__ = "0.1.0"
