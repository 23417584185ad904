"""Fast arithmetic. One file a kernel: formula and source, plain-torch reference, Triton kernel, one public function."""
