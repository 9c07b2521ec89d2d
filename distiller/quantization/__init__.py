"""Linear quantization: arithmetic, post-training quantizer, command-line flags."""

from distiller.quantization.clipping import ClipMode
from distiller.quantization.flags import add_post_train_quant_args
from distiller.quantization.linear import LinearQuantMode
from distiller.quantization.post_train import PostTrainLinearQuantizer
from distiller.quantization.train_aware import NCFQuantAwareTrainQuantizer

__all__ = [
    "ClipMode",
    "LinearQuantMode",
    "NCFQuantAwareTrainQuantizer",
    "PostTrainLinearQuantizer",
    "add_post_train_quant_args",
]
