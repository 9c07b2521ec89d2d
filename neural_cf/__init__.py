"""NeuMF from ratings to recommendations: training, INT8 quantization, evaluation, export.

``python -m neural_cf`` lists the commands. docs/architecture.md has a line for each file.
"""

__version__ = "0.2.0"
