"""The TensorFlow and Keras realisation of the spec; its twin is torch_backend."""
