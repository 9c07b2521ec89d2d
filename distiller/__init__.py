"""Distiller: calibration and linear quantization of PyTorch models, as far as NeuMF needs them."""
