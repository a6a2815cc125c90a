"""The web app, `nexus app`: a page and an API that generate images under structure control."""
