"""Weights at two precisions: checkpoints, nested planes, quantisers, the format on disk.

A leaf: nothing here knows a model, an engine or a device kernel.
"""
