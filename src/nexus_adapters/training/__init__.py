"""Training: the loss of a frozen UNet under an adapter, and one plain loop around any loss."""
