"""Making a nested checkpoint whose draft agrees: calibration text, a pass over it, and the writing.

The rules that choose scales and levels are `qspec_llm.weights.methods`; here they get the inputs
that they weigh errors by, layer after layer.
"""
