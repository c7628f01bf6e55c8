"""The OpenAI-compatible server: HTTP (`app`), the engine's thread (`worker`), what lies between.

app       routes, errors, keys and limits
protocol  request bodies
service   bodies to engine requests, engine news to responses
worker    the thread that owns the engine
"""
