"""The adapter network: it turns a structure map and a prompt into features for a denoiser."""
