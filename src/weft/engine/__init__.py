"""How a plan runs: chunks and passes over them, selection, writing in place, journal, progress.

Start at :mod:`weft.engine.chunks`; a run of a plan is :mod:`weft.engine.run`.
"""
