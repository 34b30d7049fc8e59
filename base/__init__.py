"""The bottom layer: configuration, errors, storage, fault points. Imports nothing of ours; everyone may import it."""
