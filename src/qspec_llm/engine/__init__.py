"""The speculative engine: requests with a watermark, drafted, verified, accepted, committed.

A step is `Engine.step`; each of its lines is a module of this package.
"""
