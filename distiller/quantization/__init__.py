"""Linear quantization: arithmetic, post-training quantizer, command-line flags."""

from .arguments import add_post_train_quant_args
from .clipping import ClipMode
from .linear import LinearQuantMode
from .post_train import PostTrainLinearQuantizer
from .train_aware import NCFQuantAwareTrainQuantizer

__all__ = [
    "ClipMode",
    "LinearQuantMode",
    "NCFQuantAwareTrainQuantizer",
    "PostTrainLinearQuantizer",
    "add_post_train_quant_args",
]
