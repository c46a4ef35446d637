"""One Transformer spec, two frameworks, one Horovod training loop.

Nothing in this package imports a framework: tensors on this side of the seam are NumPy arrays.
"""

__version__ = "0.1.0"
