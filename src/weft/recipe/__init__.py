"""What to do, as data: weft's recipes and mergekit's files, checked, planned from headers, carried out.

:mod:`weft.recipe.schema` has the fields, :mod:`weft.recipe.read` reads files, :mod:`weft.recipe.planner` turns a recipe
into a plan, :mod:`weft.recipe.run` is ``weft.run``.
"""
