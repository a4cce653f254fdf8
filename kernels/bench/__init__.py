"""Benches of the CPU kernels: each prints the ceiling, checks results, then times; a JSON line comes last."""
