"""Normal callbacks: requests that VOD sends are received, processed in batches, and answered when it is safe."""
