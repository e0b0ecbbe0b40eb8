"""The Triton kernels, made of the byte permutations in `permute`; imported when they first run."""
