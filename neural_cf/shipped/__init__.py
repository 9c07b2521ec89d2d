"""Files that come with the package: schedules of quantization-aware training, and the published model's statistics."""
