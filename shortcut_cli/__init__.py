"""shortcut: tokenize, train, evaluate and sample cross-layer attention models on sound, music and text."""

__version__ = "0.1.0"
SCHEMA_VERSION = 2  # of every JSON result: raised when a key changes its name or meaning
