"""Compiled loops over arrays: conversions, reductions, selection, random streams.

Everything here works on numpy arrays, releases the GIL, and needs no torch. Start at :mod:`weft.kernels.convert`.
"""
