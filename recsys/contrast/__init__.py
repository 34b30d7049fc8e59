"""A self-supervised task beside the main one: items of a corpus are told apart by parts of their features."""
