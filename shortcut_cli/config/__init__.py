"""Recipes: their schema, reading and writing."""
