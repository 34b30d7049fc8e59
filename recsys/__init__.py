"""Examples in, a trained and measured model out. PyTorch, TorchRec, fbgemm; MLflow only in `registry`."""
