"""How a gradient stage trains: one loop, its objectives, the DeepSpeed engine, checkpoints."""
