"""Training: the loss of a frozen denoiser under an adapter, and one plain loop around any loss."""
