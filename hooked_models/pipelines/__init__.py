"""Opening diffusers pipelines: the hub, loading, checks at load, image sizes."""
