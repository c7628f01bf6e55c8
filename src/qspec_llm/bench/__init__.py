"""Measurements: kernels, steps, whole generations. Correct first, then fast, always interleaved."""
