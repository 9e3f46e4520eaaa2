"""Triton kernels for GPUs. Import only where Triton is installed; `torch_ops` does so on CUDA.

Under `TRITON_INTERPRET=1`, set before this package is imported, they run on CPU tensors, slowly.
"""
