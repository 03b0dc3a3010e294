"""Mixed-precision training: recipes, low-precision matmuls, loss scaling, the fused optimizer sweep."""
