"""Where a model's weights are read: safetensors, torch files, adapters and Hub repositories behind one lazy mapping.

Start at :func:`weft.checkpoint.open.open_checkpoint`, which is ``weft.open``.
"""
