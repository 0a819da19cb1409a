"""Triton kernels, one op a file; installed as ``fusekern.kernels``."""
