"""Layers that are no method: frozen quantized linears, and what trains in float32 beside an adapter."""
