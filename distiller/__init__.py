"""Calibration, linear quantization and ONNX export of PyTorch models, as far as NeuMF needs them."""
