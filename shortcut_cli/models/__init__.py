"""Architectures: one file each, from ids to logits, with no loss inside."""
