"""The networks: ViT encoder, masked autoencoder, classifier; their weights in and out."""
