"""The field's four workloads: served here at a smaller size, simulated at their own."""
