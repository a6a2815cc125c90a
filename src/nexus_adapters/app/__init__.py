"""The web app: a page to draw, type and see, and its API. Needs the extra `app`."""
