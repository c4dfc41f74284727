"""Makes weights from the arrays of a checkpoint, as their mapping defines it."""

import numpy as np


def joined(mapping, *arrays):
    """A weight, from the whole arrays of its tensors."""
    common = {array.dtype for array in arrays}
    dtype = common.pop() if len(common) == 1 else np.float32
    rows = mapping.arrange(*(array.astype(dtype) for array in arrays))
    return (rows.T if mapping.kernel else rows).reshape(mapping.shape)
