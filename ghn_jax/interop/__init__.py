"""In and out of PyTorch: files, converters, and our numbers beside the authors'."""
