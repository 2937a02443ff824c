"""Layers that are no adapter method: frozen (quantized) linears, and `modules_to_save` in float32."""
