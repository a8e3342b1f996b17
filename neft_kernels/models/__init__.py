"""Noisy embeddings in modules and Hugging Face models, on top of :mod:`neft_kernels.ops`."""
