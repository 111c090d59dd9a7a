"""Figures that commands write."""
