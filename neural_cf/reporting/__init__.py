"""Reports for people: evaluation reports and their comparison, quantization tables, and figures."""
