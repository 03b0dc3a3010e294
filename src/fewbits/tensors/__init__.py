"""Numbers in tensors: casts, scales, packing, quantized tensors."""
