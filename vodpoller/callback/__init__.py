"""Normal callbacks: what VOD sends by HTTP is taken in, processed as a batch of one, and answered when it is safe."""
