"""Pure algebra of low-rank factors on torch tensors: no I/O, no state, no mutation."""
