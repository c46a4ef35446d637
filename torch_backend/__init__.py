"""The PyTorch realisation of the spec; its twin is tf_backend."""
