"""A file a family: `aot_cases()`, calls of its entry with tensors of real models' shapes on the meta device."""
