"""Tables in, one example table out. Polars; never torch."""
