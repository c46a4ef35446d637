"""Builds one Horovod wheel for today's PyTorch and TensorFlow; `scripts/build_horovod.py` is its
command.
"""
