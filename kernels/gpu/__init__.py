"""Triton kernels, one operation per file.

Only ``runtime``, ``table`` and the commands may be imported freely: every other module imports triton, which decides at
its import whether functions are compiled or interpreted. ``runtime.load`` imports them in the right order.
"""
