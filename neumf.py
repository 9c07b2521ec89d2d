"""NeuMF, under the name by which scripts beside it import it: ``from neumf import NeuMF``.

Here are the model, and the functions that turn the weights of a whole final layer into those of a split one and back.
The code is in neural_cf/model.py.
"""

from neural_cf.model import (
    NeuMF,
    join_final_layer,
    sizes_from_state_dict,
    split_final_layer,
    with_final_layer,
)

__all__ = ["NeuMF", "join_final_layer", "sizes_from_state_dict", "split_final_layer", "with_final_layer"]
