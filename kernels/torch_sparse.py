"""What is used of torch's 2:4 matrices (torch.sparse) beyond what torch documents: all of it is here.

`_DTYPE_SHAPE_CONSTRAINTS`         which sizes cuSPARSELt takes is asked before a run starts, not found out in its first step
`_semi_structured_conversions`     an export writes CUTLASS's form without a GPU, which the documented way of making it needs
"""

import torch
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

cutlass_from_dense = sparse_semi_structured_from_dense_cutlass


def cusparselt_step(dtype: torch.dtype) -> int:
    """Gives the number that both sizes of a 2:4 matrix are multiples of: it is compressed, and so is its transpose."""
    sizes = SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS[dtype]
    return max(sizes.sparse_min_rows, sizes.sparse_min_cols)
