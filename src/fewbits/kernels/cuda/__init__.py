"""Triton kernels for CUDA tensors. Imported only where there is such a tensor and Triton is installed.

They also run on the CPU with ``TRITON_INTERPRET=1``, far too slowly for anything but tests.
"""
