"""The web app, `nexus app`: a page to draw, type and see, and its API. Needs the extra `app`."""
