"""INT8: calibration, scoring in integers, and the choice and the cost of a quantization."""
