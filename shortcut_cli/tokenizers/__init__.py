"""Tokenizers: one file a domain, from files to ids and back."""
