"""Losses, each as its formula."""

from torch import Tensor
from torch.nn import functional

# Shape suffixes: B = batch, T = tasks.


def log_loss(logits_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean binary log loss over examples, summed over tasks (AutoInt, equation 10). Returns a scalar."""
    return functional.binary_cross_entropy_with_logits(logits_BT, labels_BT, reduction="none").mean(0).sum()
