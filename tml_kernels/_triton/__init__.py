"""Device functions that several ops' kernels share."""
