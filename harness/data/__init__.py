"""With which images: shards and their index, order, subsets, labels, augmentation, packing."""
