"""Triton kernels, one op a file, named as in ``fusekern.ops``. Installed as ``fusekern.kernels``; imports torch and
triton alone. An op's file in ``fusekern/ops`` decides when its kernel runs."""
