"""Patient-level differential privacy at the site."""
