"""Fast arithmetic. One file a kernel: formula and source, plain-torch reference, Triton and numba kernels, one public function."""
