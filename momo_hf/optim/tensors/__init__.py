"""The tensors of all parameters: sorted into buckets, cut into pieces, summed over shards."""
