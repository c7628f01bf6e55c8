"""Fidelity: what each view of a model computes, against the original weights and each other."""
