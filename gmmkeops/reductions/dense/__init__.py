"""The dense engine: tiles of points and components that fit into cache, in torch operations."""
