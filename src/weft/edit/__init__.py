"""Patches on trained weights."""
