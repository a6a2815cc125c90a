"""The adapter network: a structure map and a prompt become features for a UNet."""
