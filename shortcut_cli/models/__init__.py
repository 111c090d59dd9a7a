"""Architectures, one file each, from ids to logits; the loss is apart."""
