"""What is not collected where an optional package is missing."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("triton") else ["src/weft/kernels/triton_packed.py"]
