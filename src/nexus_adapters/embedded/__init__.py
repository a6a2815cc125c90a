"""The embedded world: small scenes of colored shapes; images, captions and structure are known exactly."""
