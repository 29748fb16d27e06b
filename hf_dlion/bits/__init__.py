"""Signs as bits: packing, counting, rounding, hashing and the kernels. Tensors in, tensors out; no process groups."""
