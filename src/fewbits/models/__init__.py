"""Models on disk and in memory: sources, layouts, quantized layers, loading."""
