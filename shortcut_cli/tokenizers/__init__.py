"""Tokenizers: from files to ids and back, one for each domain."""
