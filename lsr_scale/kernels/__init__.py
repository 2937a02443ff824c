"""Operations of the fused path: each file holds one, its plain reference beside its Triton kernel. Tensors only."""
